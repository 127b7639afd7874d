# SPDX-License-Identifier: Apache-2.0
"""No file that is read runs code: a real attack waits at every door of the package."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.checkpoint.sharded import StoredTensors
from lightning_moefold.cli.main import main
from lightning_moefold.planner.cost.routing import RoutingProfile
from lightning_moefold.plots.files import EXPERT_LOAD
from lightning_moefold.plots.read import read_run
from lightning_moefold.recipes import InputError, TextData
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.checkpoint import jobs_attacks
from tests.checkpoint.jobs_attacks import ATTACKS, Attack, make_attack
from tests.recipes.chats import chat_tokenizer


@pytest.fixture(scope="module")
def folder(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``model/`` and ``good.ckpt``, a checkpoint of a run."""
    folder = tmp_path_factory.mktemp("attacks")
    make_checkpoint(folder / "model", "qwen2_moe", num_hidden_layers=1)
    pool.run(jobs_attacks.save, str(folder / "model"), str(folder), ranks=1)
    return folder


def _attack(marker: Path) -> bytes:
    return pickle.dumps(Attack(marker))


def test_the_attack_is_real(folder: Path, tmp_path: Path) -> None:
    """Torch's own reader runs it, from the metadata and from what the metadata calls bytes."""
    pickle.loads(_attack(tmp_path / "attacked"))
    assert (tmp_path / "attacked").exists()
    for name in ("in place of .metadata", "inside .metadata", "a tensor as bytes"):
        bad, marker = make_attack(folder, name)
        tensor = torch.empty(32, dtype=torch.float64)
        with contextlib.suppress(BaseException):  # torch's own error is no Exception
            dcp.load({"model.model.model.norm.weight": tensor}, checkpoint_id=bad, no_dist=True)
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.parametrize("name", ATTACKS)
def test_export_and_readers(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad, marker = make_attack(folder, name)
    status = main(["export", "--checkpoint", str(bad), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.startswith("moefold export: ")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    tensor = torch.empty(32, dtype=torch.float64)
    if "meta.pt" not in name:
        for check in (True, False):  # without checksums, too
            with pytest.raises(CheckpointError):
                StoredTensors(bad, {}, check=check).fill({"model.model.model.norm.weight": tensor})
            if name != "in place of tensors":
                with pytest.raises(CheckpointError, match="its list of tensors"):
                    StoredTensors(bad, {}, check=check)
    assert not marker.exists()


def test_trainer(pool: RankPool, folder: Path) -> None:
    """``ckpt_path`` of fit, validate, test and predict, and load_from_checkpoint."""
    [seen] = pool.run(jobs_attacks.at_the_trainer, str(folder / "model"), str(folder), ranks=1, timeout=120.0)
    assert len(seen) == len(ATTACKS) * 6
    for (name, door), (said, attacked) in seen.items():
        assert not attacked, f"{name} ran at {door}"
        if door in ("fit", "validate", "test", "predict"):
            assert said.startswith("CheckpointError: "), (name, door, said)


def test_single_files(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    """Files of Lightning's own form: not looked at with a model in pieces, read as plain data with any other module."""
    [seen] = pool.run(jobs_attacks.single_files, str(folder / "model"), str(tmp_path), ranks=1)
    assert len(seen) == 2 * 4
    for (module, verb), (said, attacked) in seen.items():
        assert not attacked, (module, verb)
        assert ("is a single file" if module == "MoE" else "Weights only load failed") in said


def test_models(folder: Path, tmp_path: Path) -> None:
    """A directory in Hugging Face format: pickled weights, code of its own, and both beside good weights."""
    marker = tmp_path / "attacked"
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    code = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    (model / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (model / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (model / "pytorch_model.bin").write_bytes(_attack(marker))
    MoECausalLM.from_pretrained(model)
    assert main(["verify", "--checkpoint", str(model), "--fold", "", "--ranks", "1", "--steps", "1"]) == 0
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors is read"):
        MoECausalLM.from_pretrained(model)
    (model / "model.safetensors").write_bytes(_attack(marker))
    with pytest.raises(CheckpointError, match="damaged"):
        MoECausalLM.from_pretrained(model)
    assert not marker.exists()


def test_caches_and_traces(tmp_path: Path) -> None:
    """Tokenised rows, recorded routing and expert load."""
    marker = tmp_path / "attacked"
    (tmp_path / "a.txt").write_text("text " * 200)
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", None)
    files = [str(tmp_path / "a.txt")]
    data = TextData(tokenizer=str(tokenizer), files=files, cache_dir=str(tmp_path / "cache"), sequence_length=8)
    data.tokenize()
    buffer = io.BytesIO()
    torch.save(Attack(marker), buffer)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".bin", ".json", ".pt"}
    for path in kept:
        whole = path.read_bytes()
        for content in (_attack(marker), buffer.getvalue()):
            path.write_bytes(content)
            # A file of plain numbers that is not read, trained.bin of a text, may hold anything.
            unread = path.name == "trained.bin"
            refused = pytest.raises(InputError, match="delete it, and the text is tokenised again")
            with nullcontext() if unread else refused:
                data.tokenize()
        path.write_bytes(whole)
    counts = np.array([Attack(marker)], dtype=object)
    np.save(tmp_path / "a.npy", counts)
    np.savez(tmp_path / "b.npz", counts=counts)
    (tmp_path / "c.npy").write_bytes(_attack(marker))
    for name in ("a.npy", "b.npz", "c.npy"):
        with pytest.raises(ValueError, match="pickle"):
            RoutingProfile.from_trace(tmp_path / name)
    run = tmp_path / "run"
    run.mkdir()
    np.savez(run / EXPERT_LOAD, steps=counts, layers=counts, counts=counts)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_run(run)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_configuration_files(tmp_path: Path, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "attacked"
    (tmp_path / "run.yaml").write_text(f"model:\n  checkpoint: {tag} ['touch {marker}']\n")
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "could not determine a constructor for the tag" in capsys.readouterr().err
    assert not marker.exists()
