# SPDX-License-Identifier: Apache-2.0
"""The other doors of docs/checkpoints.md: files beside checkpoints, adapters, templates, tokenizers, datasets, sockets."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_moefold import MoECausalLM
from lightning_moefold.adapters.files import AdapterFiles
from lightning_moefold.checkpoint import CheckpointError, HFCheckpoint
from lightning_moefold.checkpoint.drafts import sweep
from lightning_moefold.checkpoint.sharded import StoredTensors, pack, save_sharded
from lightning_moefold.checkpoint.sums import CHECKSUMS
from lightning_moefold.diagnostics.liveness import RollCall
from lightning_moefold.errors import HardwareError, InputError, MoEFoldError
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoEConfig
from lightning_moefold.planner.machine.hardware import Hardware
from lightning_moefold.plots.plans import read_plans
from lightning_moefold.recipes import TextData
from tests.checkpoint.jobs_attacks import Attack
from tests.recipes.chats import chat_tokenizer, write


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Appears if an attack succeeds; it must not be there at the end."""
    pickle.loads(pickle.dumps(Attack(real := tmp_path / "real")))
    assert real.exists()
    real.unlink()
    yield (path := tmp_path / "attacked")
    assert not path.exists()


def test_checksums_and_leases(tmp_path: Path, marker: Path) -> None:
    attack = pickle.dumps(Attack(marker))
    path = tmp_path / "a.ckpt"
    save_sharded(pack(path, {}, SINGLE), {"a": torch.ones(3)}, SINGLE)
    (path / ".checksums").write_bytes(attack)
    with pytest.raises(CheckpointError, match="does not have the checksum that it names"):
        StoredTensors(path, {})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CHECKSUMS).write_bytes(attack)
    with pytest.raises(CheckpointError, match="does not have the checksum that it names"):
        HFCheckpoint(tmp_path / "model")
    (tmp_path / ".b.ckpt.0123abcd.lease").write_bytes(attack)
    os.utime(tmp_path / ".b.ckpt.0123abcd.lease", (1, 1))
    assert sweep(tmp_path) == ["b.ckpt"]


def test_what_a_lease_names_is_not_followed(tmp_path: Path, marker: Path) -> None:
    """A draft that is a link to a folder of somebody else loses the link only; a name cannot lead elsewhere."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".b.ckpt.0123abcd.tmp").symlink_to(tmp_path / "precious")
    lease = tmp_path / "run" / ".b.ckpt.0123abcd.lease"
    lease.write_text(json.dumps({"machine": ["elsewhere"], "process": "../../precious"}))
    os.utime(lease, (1, 1))
    assert sweep(tmp_path / "run") == ["b.ckpt"]
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    assert list((tmp_path / "run").iterdir()) == []


def test_numbers_in_checksums_stay_in_the_chunk(tmp_path: Path) -> None:
    """Checksums that were made to fit, with elements said to lie outside of the chunk: the file is read as torch reads it."""
    from lightning_moefold.checkpoint import sums

    path = tmp_path / "a.ckpt"
    save_sharded(pack(path, {}, SINGLE), {"a": torch.ones(3)}, SINGLE)
    content = sums.unpack_sums((path / ".checksums").read_bytes(), "")
    for data in (10**9, -(10**9)):
        [[start, length, checksum, _]] = content["chunks"]["__0_0.distcp"]
        changed = {**content, "chunks": {"__0_0.distcp": [[start, length, checksum, data]]}}
        (path / ".checksums").write_bytes(sums.pack_sums(changed))
        assert torch.equal(StoredTensors(path, {}).read("a"), torch.ones(3))


def test_adapters(tmp_path: Path, marker: Path) -> None:
    model = MoECausalLM(
        MoEConfig.from_hf({
            "model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1,
        })
    )  # fmt: skip
    folder = tmp_path / "adapter"
    folder.mkdir()
    code = {"auto_mapping": {"base_model_class": "os.system", "parent_library": str(marker)}}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **code}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        AdapterFiles(folder, model)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        AdapterFiles(folder, model)
    (folder / "adapter_config.json").write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(CheckpointError, match="is not JSON"):
        AdapterFiles(folder, model)


def test_templates(tmp_path: Path, marker: Path) -> None:
    """Jinja is rendered in the sandbox of transformers: it does not reach Python's functions."""
    way = "{{ cycler.__init__.__globals__.os.popen('touch " + str(marker) + "').read() }}"
    tokenizer = chat_tokenizer(
        tmp_path / "tokenizer", way + "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    talks = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    file = write(tmp_path / "talks.jsonl", talks)
    data = TextData(tokenizer=str(tokenizer), files=[str(file)], cache_dir=str(tmp_path / "c"), sequence_length=8)
    with pytest.raises(InputError, match="unsafe"):
        data.tokenize()


@pytest.mark.more
def test_tokenizers(tmp_path: Path, marker: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", None)
    (tokenizer / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.txt").write_text("text " * 200)
    data = TextData(
        tokenizer=str(tokenizer), files=[str(tmp_path / "a.txt")], cache_dir=str(tmp_path / "c"), sequence_length=8
    )
    with pytest.raises(InputError, match="trust_remote_code=True"):
        data.tokenize()


@pytest.mark.more
def test_datasets(tmp_path: Path, marker: Path) -> None:
    """A directory of datasets with a script and pickles in it, and files that are pickles."""
    import datasets

    folder = tmp_path / "rows"
    datasets.Dataset.from_dict({"text": ["a b c"] * 9}).save_to_disk(folder)
    (folder / "rows.py").write_text(f"open({str(marker)!r}, 'w')\n")
    tokenizer = str(chat_tokenizer(tmp_path / "tokenizer", None))

    def tokenize(*files: Path) -> None:
        TextData(
            tokenizer=tokenizer, files=list(map(str, files)), cache_dir=str(tmp_path / "c"), sequence_length=4
        ).tokenize()

    tokenize(folder)
    attack = pickle.dumps(Attack(marker))
    tables = list(folder.glob("*.arrow"))
    assert tables
    for file in (*tables, folder / "state.json", folder / "dataset_info.json"):
        copy = tmp_path / f"{file.stem}-bad"
        shutil.copytree(folder, copy)
        (copy / file.name).write_bytes(attack)
        with pytest.raises(MoEFoldError):
            tokenize(copy)
    for ending in ("parquet", "jsonl", "json"):
        (tmp_path / f"a.{ending}").write_bytes(attack)
        with pytest.raises(InputError):
            tokenize(tmp_path / f"a.{ending}")


def test_hardware_and_plans(tmp_path: Path, marker: Path) -> None:
    attack = pickle.dumps(Attack(marker))
    (tmp_path / "a.toml").write_bytes(attack)
    (tmp_path / "a.json").write_bytes(attack)
    with pytest.raises(HardwareError, match="is not valid TOML"):
        Hardware.from_toml(tmp_path / "a.toml")
    with pytest.raises(InputError):
        read_plans(tmp_path / "a.json")


def test_the_roll_call(marker: Path) -> None:
    """What a stranger sends to the socket is not read, and texts of other ranks are texts."""
    attack = pickle.dumps(Attack(marker))
    store: Any = dist.HashStore()
    call = RollCall(store, 0)
    call.announce()
    host, port = store.get("moefold/liveness/address/0").decode().split()
    with socket.create_connection((host, int(port)), timeout=5) as stranger:
        stranger.sendall(attack)
        call.announce()
    store.set("moefold/liveness/words/1", attack.decode("latin-1"))
    store.set("moefold/liveness/address/1", f"{host} {port}")
    assert call.probe([0, 1]).words
