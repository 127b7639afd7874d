# SPDX-License-Identifier: Apache-2.0
"""Chunks of tensors: readable by torch, read in slices, and checked by those who read them."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_moefold.checkpoint import drafts, sharded, stores, sums
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.checkpoint.chunks import LIST, SUMS, TensorPiece
from lightning_moefold.checkpoint.sharded import META, load_meta, pack, save_sharded
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box
from lightning_moefold.mesh import SINGLE

STACK = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
TENSORS: dict[str, torch.Tensor] = {
    "model.a": torch.arange(35.0).view(5, 7),
    "model.b": torch.randn(6, 4).bfloat16()[1:3],
    "model.t": torch.randn(3, 4, dtype=torch.float64).t(),
    "model.none": torch.empty(0, 3),
    "optimizer.0.a.step": torch.tensor(3.0),
    "model.stack": STACK,
}


def _described() -> dict[str, Any]:
    stack = TensorPiece(STACK, (Box.whole(STACK.shape),), tuple(STACK.shape), stacked=True)
    return {**TENSORS, "model.stack": stack}


def _save(path: Path, **options: Any) -> Path:
    save_sharded(pack(path, {"epoch": 1}, SINGLE, **options), _described(), SINGLE)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("saved") / "a.ckpt")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def _open(path: Path, **options: Any) -> StoredTensors:
    return StoredTensors(path, load_meta(path), **options)


def _read_all(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The sentence of the error, or the tensors."""
    try:
        stored = _open(path)
        return "", {name: stored.read(name) for name in TENSORS}
    except CheckpointError as error:
        return str(error), {}


def test_what_is_saved_is_read(saved: Path, tmp_path: Path) -> None:
    """With checksums and without, by us and by torch."""
    plain = _save(tmp_path / "plain.ckpt", summed=False)
    assert (saved / SUMS).exists()
    assert not (plain / SUMS).exists()
    for stored in (_open(saved), _open(saved, check=False), _open(plain)):
        assert set(stored.items) == set(TENSORS)
        for name, tensor in TENSORS.items():
            read = stored.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {name: torch.zeros_like(t) for name, t in TENSORS.items() if t.numel()}
        dcp.load(theirs, checkpoint_id=saved, no_dist=True)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in theirs.items())


def test_a_slice_reads_only_its_experts(copy: Path) -> None:
    """Two of six experts, and columns of them: the other experts' bytes may be anything."""
    stored = _open(copy)
    begin = sorted(info.offset for index, info in stored._list.storage_data.items() if index.fqn == "model.stack")
    assert len(begin) == 6
    content = bytearray((copy / "__0_0.distcp").read_bytes())
    for expert in (0, 1, 2, 4):
        content[begin[expert] : begin[expert] + 500] = bytes(500)
    (copy / "__0_0.distcp").write_bytes(content)
    piece = torch.zeros(2, 4, 2)
    boxes = Box((3, 0, 1), (1, 4, 2)), Box((5, 0, 1), (1, 4, 2))
    _open(copy).fill({"model.stack": TensorPiece(piece, boxes, (6, 4, 5))})
    assert torch.equal(piece, STACK[[3, 5], :, 1:3])
    with pytest.raises(CheckpointError, match="'model.stack' does not have the checksum that was saved"):
        _open(copy).read("model.stack")


@pytest.mark.parametrize("name", [n for n, t in TENSORS.items() if t.numel()])
def test_a_flipped_bit_names_its_tensor(copy: Path, name: str) -> None:
    stored = _open(copy)
    info = next(info for index, info in stored._list.storage_data.items() if index.fqn == name)
    file = copy / info.relative_path
    whole = file.read_bytes()
    for place in (info.offset, info.offset + info.length // 2, info.offset + info.length - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{name!r} does not have the checksum that was saved"):
            _open(copy).read(name)
    for other in set(TENSORS) - {name}:
        assert torch.equal(_open(copy).read(other), TENSORS[other])
    _open(copy, check=False)


def test_every_byte_counts(copy: Path) -> None:
    """A flipped bit anywhere is an error in one sentence, or changes nothing that is read."""
    draw = random.Random(0)
    for file in sorted(copy.iterdir()):
        whole = file.read_bytes()
        refused = 0
        for _ in range(60):
            place = draw.randrange(len(whole))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
            said, read = _read_all(copy)
            assert "\n" not in said
            refused += bool(said)
            assert said or all(torch.equal(read[name], TENSORS[name]) for name in TENSORS), file
        assert refused == 60 or file.name == META, (file.name, refused)  # dates in an archive mean nothing
        file.write_bytes(whole)


@pytest.mark.parametrize("file", [LIST, SUMS, META, "__0_0.distcp"])
def test_a_file_is_cut_off_or_gone(copy: Path, file: str) -> None:
    whole = (copy / file).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1, None):
        (copy / file).unlink()
        if size is not None:
            (copy / file).write_bytes(whole[:size])
        said, _ = _read_all(copy)
        assert said
        assert not any(word in said for word in ("\n", "inline_container", "EOFError")), said
        (copy / file).write_bytes(whole)


def test_a_part_of_another_save(copy: Path, tmp_path: Path) -> None:
    """A file of the right size from another save is not taken for this one's."""
    other = tmp_path / "other.ckpt"
    shifted = {name: tensor + 1 for name, tensor in TENSORS.items()}
    shifted["model.stack"] = TensorPiece(STACK + 1, (Box.whole(STACK.shape),), tuple(STACK.shape), stacked=True)  # type: ignore[assignment]
    save_sharded(pack(other, {}, SINGLE), shifted, SINGLE)
    shutil.copy(other / "__0_0.distcp", copy)
    with pytest.raises(CheckpointError, match="does not have the checksum"):
        _open(copy).read("model.a")


def test_without_the_library(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRC-32 is written and checked; of XXH3 sums one warning says that they are not checked."""
    monkeypatch.setattr(sums, "_KINDS", {"crc32": sums._CRC32})
    monkeypatch.setattr(sums, "ALGORITHM", "crc32")
    for function in (sums.new_sum, sums.sum_of):
        monkeypatch.setattr(function, "__defaults__", ("crc32",))
    sums.is_known.cache_clear()
    with pytest.warns(UserWarning, match="pip install xxhash"):
        assert torch.equal(_open(saved).read("model.a"), TENSORS["model.a"])
    path = _save(tmp_path / "crc.ckpt")
    assert b'"crc32"' in (path / SUMS).read_bytes()
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[800] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        _open(path).read("model.a")
    sums.is_known.cache_clear()


@contextmanager
def _full(path: Path) -> Iterator[IO[bytes]]:
    """What stores.create does, on a disk that is full."""
    path.touch()
    with open("/dev/full", "wb", buffering=0) as file:
        yield file


def _fails(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("place", "name", "fault", "words"),
    [
        pytest.param(stores, "create", _full, "no space is left", id="full", marks=pytest.mark.skipif(
            sys.platform != "linux", reason="/dev/full is Linux's")),
        pytest.param(stores, "create", _fails(errno.EDQUOT), "the quota of the disk is used up", id="quota"),
        pytest.param(drafts.Path, "mkdir", _fails(errno.EROFS), "the file system is read-only", id="read-only"),
        pytest.param(drafts.Path, "open", _fails(errno.EACCES), "there is no permission", id="no permission"),
        pytest.param(sharded, "publish", _fails(errno.ENOENT), "a file or directory is gone", id="gone"),
    ],
)  # fmt: skip
def test_one_sentence(
    copy: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, fault: Any, words: str
) -> None:
    """The error names the cause, and what was there is unchanged."""
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fault)
        with pytest.raises(CheckpointError, match=f"{words}.*what was saved before is unchanged") as caught:
            _save(copy)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["a.ckpt"]
