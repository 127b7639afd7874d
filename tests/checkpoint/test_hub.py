# SPDX-License-Identifier: Apache-2.0
"""Models by their names on the hub, out of a cache in the hub's layout; nothing here reaches the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lightning_moefold import MoECausalLM, MoEConfig
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.errors import CheckpointError
from lightning_moefold.planner.search.models_zoo import find_model
from lightning_moefold.testing import make_checkpoint

NAME, COMMIT = "someone/tiny-moe", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model in a directory; it is in the cache as well, its weights by a link to a blob as the hub places them."""
    path = make_checkpoint(tmp_path / "plain", "mixtral")
    root = tmp_path / "hub" / "models--someone--tiny-moe"
    snapshot = root / "snapshots" / COMMIT
    for folder in ("blobs", "refs"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(path, snapshot)
    shutil.move(snapshot / "model.safetensors", root / "blobs" / "weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    for revision in ("main", "v1"):
        (root / "refs" / revision).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return path


def test_a_model_of_the_cache(plain: Path) -> None:
    expected = MoECausalLM.from_pretrained(plain)
    for name in (NAME, f"{NAME}@v1", f"{NAME}@{COMMIT}"):
        model = MoECausalLM.from_pretrained(name)
        assert all(torch.equal(p, expected.get_parameter(n)) for n, p in model.named_parameters())
    assert model.describe()["path"].endswith(COMMIT)
    assert MoECausalLM.from_pretrained(NAME, revision="v1").describe() == model.describe()
    assert MoEConfig.from_pretrained(NAME) == find_model(NAME) == expected.config


def test_a_directory_goes_first(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain.parent)
    (plain.parent / "someone").mkdir()
    shutil.copytree(plain, plain.parent / NAME)
    assert local_directory(NAME) == Path(NAME)
    assert local_directory("plain") == Path("plain")
    assert local_directory("/some/where") == Path("/some/where")


@pytest.mark.parametrize(("name", "sentence"), [(f"{NAME}@v1", "another revision"), (".", "is a directory")])
def test_a_revision_that_does_not_fit(plain: Path, name: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        MoECausalLM.from_pretrained(name, revision="main")


@pytest.mark.parametrize("name", ["someone/other", f"{NAME}@v2"])
def test_what_is_not_there(plain: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no directory here, nor in the hub's cache.*HF_TOKEN") as caught:
        MoECausalLM.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_other_formats_are_not_read(plain: Path) -> None:
    snapshot = local_directory(NAME)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only safetensors is read"):
        MoECausalLM.from_pretrained(NAME)
