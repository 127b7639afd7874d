# SPDX-License-Identifier: Apache-2.0
"""Access to files in a local folder or in a store that fsspec reaches by its scheme (``s3://``, ``memory://``)."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from lightning_moefold import comm
from lightning_moefold.agreement import agree_on_error
from lightning_moefold.errors import CheckpointError
from lightning_moefold.mesh import Axis

_SCHEME = re.compile(r"[A-Za-z][\w+.-]*(://|::)")


def parse_path(path: str | os.PathLike[str]) -> Path | str:
    """Distinguishes local folders from addresses in a store.

    Returns:
        A Path for a local path, with or without ``file://``; the unchanged address for any other scheme.

    Raises:
        CheckpointError: If fsspec does not know the scheme, or the address has lost a slash because it was made a Path.
    """
    text = os.fspath(path)
    if _SCHEME.match(text) is None and not text.startswith("file:/"):
        return _unmangled(Path(path))
    try:
        store, inner = url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{text!r} cannot be reached: {error}.") from None
    return _unmangled(Path(inner)) if isinstance(store, LocalFileSystem) else text


def _unmangled(path: Path) -> Path:
    scheme = next((part for part in path.parts if part[-1:] == ":" and part[:-1] in known_implementations), None)
    if scheme == "file:":
        raise CheckpointError(
            f"{str(path)!r} has a folder named 'file:', which Lightning makes of an address file://...; give the plain path."
        )
    if scheme is not None:
        raise CheckpointError(
            f"{str(path)!r} has a folder named {scheme!r}, which a Path makes of an address {scheme}//...; give addresses of a "
            "store as strings."
        )
    return path


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """Returns the path of something that can only be local.

    Raises:
        CheckpointError: If the path is an address in a store; ``what`` is the subject of the sentence.
    """
    parsed = parse_path(path)
    if isinstance(parsed, str):
        raise CheckpointError(
            f"{what} {parsed!r} is in a store, and only training checkpoints are read and written there; give a local path."
        )
    return parsed


def join(path: Path | str, name: str) -> Path | str:
    """Joins a local or store path and a name below it."""
    return path / name if isinstance(path, Path) else f"{path.rstrip('/')}/{name}"


def _fs(path: str) -> tuple[Any, str]:
    store, inner = url_to_fs(path)
    store.invalidate_cache()
    return store, inner


def is_file(path: Path | str) -> bool:
    """Whether a file exists."""
    if isinstance(path, Path):
        return path.is_file()
    store, inner = _fs(path)
    return bool(store.isfile(inner))


def read(path: Path | str) -> bytes:
    """Returns the content of a file."""
    if isinstance(path, Path):
        return path.read_bytes()
    store, inner = _fs(path)
    return bytes(store.cat_file(inner))


@contextmanager
def create(path: Path | str) -> Iterator[IO[bytes]]:
    """Opens a new file for writing; once the context is left, its content is on disk or in the store."""
    if isinstance(path, Path):
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    store, inner = _fs(path)
    store.makedirs(inner.rpartition("/")[0], exist_ok=True)
    with store.open(inner, "wb") as file:
        yield file


def open_file(path: Path | str) -> IO[bytes]:
    """Opens a file for reading, without a cache: parts of it are read once."""
    if isinstance(path, Path):
        return path.open("rb", buffering=0)
    store, inner = _fs(path)
    return store.open(inner, "rb", cache_type="none")


def write(path: Path | str, content: bytes) -> None:
    """Writes a file atomically: to a store in one request, locally under another name that is then renamed."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".partial")
        with create(draft) as file:
            file.write(content)
        os.replace(draft, path)
        return
    store, inner = _fs(path)
    store.makedirs(inner.rpartition("/")[0], exist_ok=True)
    store.pipe_file(inner, content)


def remove(path: Path | str) -> None:
    """Removes a file, or a folder with all that is in it, from a store."""
    store, inner = _fs(str(path))
    if store.exists(inner):
        store.rm(inner, recursive=True)


def folders(path: str) -> list[str]:
    """Returns the names of the folders in a folder of a store."""
    store, inner = _fs(path)
    if not store.isdir(inner):
        return []
    return [
        str(entry["name"]).rstrip("/").rpartition("/")[2]
        for entry in store.ls(inner, detail=True)
        if entry["type"] == "directory"
    ]


def sizes(path: Path | str) -> dict[str, int]:
    """Returns the number of bytes of each file in a folder, by name."""
    if isinstance(path, Path):
        return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    store, inner = _fs(path)
    return {
        str(e["name"]).rpartition("/")[2]: int(e["size"]) for e in store.ls(inner, detail=True) if e["type"] == "file"
    }


def check_folder(path: Path, what: str = "checkpoints") -> None:
    """Checks that a local folder can be written, or made, without making it.

    Args:
        path: The folder.
        what: What is to be saved there, in the plural, for the error's sentence.

    Raises:
        CheckpointError: If it cannot; the message names the part of the path that forbids it.
    """
    there = next(part for part in (path.absolute(), *path.absolute().parents) if os.path.lexists(part))
    if not there.is_dir():
        reason = f"{there} is {'a link to nothing' if there.is_symlink() else 'a file'}"
    elif not os.access(there, os.W_OK | os.X_OK):
        reason = f"{there} cannot be written"
    else:
        return
    raise CheckpointError(f"{what} cannot be saved to {path}, because {reason}; give another directory.")


def check_file(path: Path, what: str) -> None:
    """Checks that a local file can be written, or made, without making it; see :func:`check_folder`."""
    check_folder(path.parent, what)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        reason = "it is a directory" if path.is_dir() else "it cannot be written"
        raise CheckpointError(f"{what} cannot be saved to {path}, because {reason}; give another file.")


def check_store(path: str, world: Axis) -> None:
    """Checks that a store can be written, and that every rank sees a file written by another. Collective.

    Raises:
        CheckpointError: If it cannot be written or is not shared; the message names the store. Raised on all ranks.
    """
    trial, error = join(path, comm.broadcast_object(f".{uuid.uuid4().hex[:8]}.trial", world)), None
    try:
        if world.index == 0:
            write(trial, b"trial")
    except Exception as failure:
        error = CheckpointError(f"checkpoints cannot be saved to {path}: {type(failure).__name__}: {failure}.")
    agree_on_error(error, world)
    try:
        if not is_file(trial):
            error = CheckpointError(
                f"rank {world.index} does not see what rank 0 has written to {path}; save to a store that all ranks share"
                f"{', which memory:// is not' if path.startswith('memory:') else ''}."
            )
        agree_on_error(error, world)
    finally:
        if world.index == 0:
            remove(trial)
