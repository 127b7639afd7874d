# SPDX-License-Identifier: Apache-2.0
"""Exported models carry checksums beside, which other readers do not notice, and ours compares."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint import (
    CheckpointError,
    HFCheckpoint,
    OutputTensor,
    hf_writer,
    sums,
    write_hf_checkpoint,
)
from lightning_moefold.checkpoint.safetensors_files import PlannedFile
from lightning_moefold.checkpoint.sums import CHECKSUMS
from lightning_moefold.layout import Box
from lightning_moefold.mesh import SINGLE
from lightning_moefold.testing import make_checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    path = make_checkpoint(folder / "source", "qwen2_moe", num_hidden_layers=1, dtype=torch.bfloat16)
    MoECausalLM.from_pretrained(path).save_pretrained(folder / "model", max_shard_size=30_000)
    return folder / "model"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "model")
    return tmp_path / "model"


def _place(file: Path, name: str) -> tuple[int, int]:
    """First and last byte of a tensor in a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end - 1


def test_other_readers_do_not_notice(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    files = sorted(exported.glob("*.safetensors"))
    assert len(files) == 2
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    assert torch.equal(theirs["lm_head.weight"], held["lm_head.weight"])
    assert set(json.loads((exported / CHECKSUMS).read_bytes().partition(b"\n")[2])["tensors"]) == set(held)
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.experts.2.up_proj.weight", "model.norm.weight"]
)
def test_a_flipped_bit_names_its_tensor(copy: Path, name: str) -> None:
    weight_map = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    file = copy / weight_map[name]
    content = bytearray(file.read_bytes())
    content[_place(file, name)[1]] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name!r} does not have the checksum that was exported"):
        MoECausalLM.from_pretrained(copy)
    (copy / CHECKSUMS).unlink()  # the switch
    MoECausalLM.from_pretrained(copy)


def test_a_slice_checks_its_own_rows(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows have checksums of their own: a rank's slice is not refused for the rows of another."""
    for module in (sums, hf_writer):
        monkeypatch.setattr(module, "BLOCK", 256)
    name, out = "model.embed_tokens.weight", copy.parent / "blocks"
    MoECausalLM.from_pretrained(exported_again := copy).save_pretrained(out)
    assert exported_again == copy
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[_place(file, name)[1]] ^= 1
    file.write_bytes(content)
    rows = load_file(file)[name]
    assert torch.equal(HFCheckpoint(out).read(name, (slice(0, 48), slice(None))), rows[:48])
    for slices in ((slice(90, 96), slice(None)), (slice(None), slice(0, 3)), ()):
        with pytest.raises(CheckpointError, match="checksum"):
            HFCheckpoint(out).read(name, slices)


def test_other_files(copy: Path) -> None:
    """The index must be the exported one; a configuration may be edited, which is noticed; a cut list is refused."""
    config = json.loads((copy / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HFCheckpoint(copy)
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    with pytest.warns(UserWarning, match="config.json is not the one that was exported"):
        HFCheckpoint(copy)
    index = copy / "model.safetensors.index.json"
    whole = index.read_bytes()
    index.write_bytes(whole + b" ")
    with pytest.raises(CheckpointError, match="is not the one that was exported"):
        HFCheckpoint(copy)
    index.write_bytes(whole)
    (copy / CHECKSUMS).write_bytes((copy / CHECKSUMS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="does not have the checksum that it names"):
        HFCheckpoint(copy)


def test_dtypes_in_one_file(tmp_path: Path) -> None:
    """Wider elements lie first, at multiples of their size, whatever the order of the model."""
    held = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.tensor(2.0, dtype=torch.float64),
        "d": torch.empty(0, 4), "e": torch.randn(2, 3, 2).half(),
    }  # fmt: skip
    described = {
        name: OutputTensor(tuple(t.shape), t.dtype, (name,), False, ((0, (Box.whole(t.shape),)),))
        for name, t in held.items()
    }
    write_hf_checkpoint(tmp_path / "a", {}, described, held.__getitem__, SINGLE)
    read = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in held.items())
    ours = HFCheckpoint(tmp_path / "a")
    assert all(torch.equal(ours.read(name, ()), tensor) for name, tensor in held.items())


@pytest.mark.parametrize("fault", ["full", "quota"])
def test_a_full_disk(copy: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model = MoECausalLM.from_pretrained(copy)
    if fault == "full":
        planned = hf_writer._planned
        monkeypatch.setattr(
            hf_writer, "_planned", lambda path, members: PlannedFile(Path("/dev/full"), planned(path, members).tensors)
        )
        words = "no space is left on the disk"
    else:

        def fail(*_: Any) -> None:
            raise OSError(errno.EDQUOT, "")

        monkeypatch.setattr(hf_writer, "pack_sums", fail)
        words = "the quota of the disk is used up"
    with pytest.raises(CheckpointError, match=f"{words}; what was saved before is unchanged") as caught:
        model.save_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]
