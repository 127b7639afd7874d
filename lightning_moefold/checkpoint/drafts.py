# SPDX-License-Identifier: Apache-2.0
"""Drafts: directories that take the place of a target once they are complete and on disk.

The draft of ``DIR/NAME`` is ``DIR/.NAME.xxxxxxxx.tmp``. As long as it exists, the file ``.NAME.xxxxxxxx.lease`` beside it
says who writes it, and is touched again and again. A killed process leaves both; the next start removes them
(:func:`sweep`) if the writer is certainly gone: on this machine, if no process has its number and start time; on another
one, whose processes cannot be seen, if the lease has not been renewed for ten minutes.

Lightning takes any name with ``hpc_ckpt_`` for a checkpoint of a requeued job, so drafts of those are named ``hpc-ckpt-``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_moefold import comm
from lightning_moefold.agreement import agreeing
from lightning_moefold.mesh import Axis

#: Seconds between two renewals of a lease, and without renewal after which a writer on another machine counts as gone.
RENEWAL, LIMIT = 20.0, 600.0
_LEASE = re.compile(r"^\.(?P<name>.+)\.(?P<number>[0-9a-f]{8})\.lease$")

_REQUEUED = ("hpc_ckpt_", "hpc-ckpt-")


@contextmanager
def draft_of(target: Path, world: Axis) -> Iterator[Path]:
    """A context with an empty directory for the content of ``target``. Collective.

    Before it is left, the first rank calls :func:`publish`; otherwise nothing remains of the draft. What killed writers have
    left beside ``target`` is removed.

    Args:
        target: Directory that the draft will become; its parents are created.
        world: All ranks.

    Raises:
        OSError: If the directory cannot be created; raised on all ranks, on others than the first as PeerError.
    """
    work = _draft_name(target, comm.broadcast_object(uuid.uuid4().hex[:8], world))
    lease: Lease | None = None
    try:
        with agreeing(world):
            if world.index == 0:
                _make_parents(target)
                sweep(target.parent)
                lease = Lease(work.with_suffix(".lease"))
                work.mkdir()
        yield work
    finally:
        if lease is not None:
            shutil.rmtree(work, ignore_errors=True)
            lease.release()


def _draft_name(target: Path, number: str) -> Path:
    return target.with_name(f".{target.name.replace(*_REQUEUED)}.{number}.tmp")


def publish(work: Path, target: Path) -> None:
    """Makes a complete draft, whose files are on disk, the content of ``target``; the former content is removed.

    On Linux the two names are exchanged in one step, so ``target`` always exists. On other systems and network file
    systems, the old directory has a hidden name for a moment, and is renamed back if the new one cannot take its place.
    """
    for folder in sorted({work, *(path for path in work.rglob("*") if path.is_dir())}, reverse=True):
        sync_directory(folder)
    if not target.exists() and not target.is_symlink():
        os.replace(work, target)
        sync_directory(target.parent)
        return
    if _exchange(work, target):
        sync_directory(target.parent)
        _remove(work)
        return
    old = work.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    sync_directory(target.parent)
    _remove(old)


def remove_directory(path: Path) -> None:
    """Removes a directory that is complete at any moment while it is under its name."""
    work = _draft_name(path, uuid.uuid4().hex[:8])
    lease = Lease(work.with_suffix(".lease"))
    try:
        os.replace(path, work)
        sync_directory(path.parent)
        shutil.rmtree(work)
    finally:
        lease.release()


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on disk, where the file system can do that."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Lease:
    """A file in an existing directory that says which process writes a draft, renewed until it is released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._released = threading.Event()
        _create(path, json.dumps(_myself()).encode())
        threading.Thread(target=self._renew, name="moefold lease", daemon=True).start()

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            with suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Ends the renewal and removes the file."""
        self._released.set()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> None:
    """Creates a file with its content, in one step where the system can: an empty lease would be that of an unknown process."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            handle = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE, 0o644)
            try:
                os.write(handle, content)
                os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=folder, follow_symlinks=True)
            finally:
                os.close(handle)
        finally:
            os.close(folder)
    except (OSError, AttributeError):  # not on this file system, or not on this operating system
        with path.open("xb") as file:
            file.write(content)


def sweep(directory: Path) -> list[str]:
    """Removes what killed writers have left in a directory, and gives a directory back its name where one was killed in between.

    Nothing is touched that has no lease, or whose writer may still run. Errors of the file system are ignored: another
    process may sweep at the same time.

    Returns:
        The names of the directories whose writers were gone.
    """
    gone = []
    with suppress(OSError):
        for path in sorted(directory.iterdir()):
            match = _LEASE.match(path.name)
            if match is None or not _is_gone(path):
                continue
            old, target = path.with_suffix(".old"), directory / match["name"].replace(*_REQUEUED[::-1])
            with suppress(OSError):
                if old.exists() and not target.exists():
                    os.replace(old, target)  # killed between two renames
                    sync_directory(directory)
                for left in (path.with_suffix(".tmp"), old):
                    if left.exists() or left.is_symlink():
                        _remove(left)
                path.unlink(missing_ok=True)
                gone.append(target.name)
    return gone


def _is_gone(lease: Path) -> bool:
    """Whether the process that wrote a lease has certainly ended."""
    writer: Any = None
    with suppress(OSError, ValueError):
        writer = json.loads(lease.read_text())
    if isinstance(writer, dict) and writer.get("machine") == _machine() and isinstance(writer.get("process"), int):
        return not _runs(writer["process"], writer.get("started"))
    with suppress(OSError):
        return _age(lease) > LIMIT
    return False


def _age(path: Path) -> float:
    """Seconds since a file was changed, by the clock of its file system."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _myself() -> dict[str, Any]:
    return {"machine": _machine(), "process": os.getpid(), "started": _start_of(os.getpid())}


def _machine() -> list[str]:
    """What processes share that see each other's numbers: a machine since it was started, and a container on it."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return found


def _runs(process: int, started: str | None) -> bool:
    """Whether a process of this machine still runs. Numbers are used again, so its start must be the same, if it is known."""
    try:
        os.kill(process, 0)
    except PermissionError:  # somebody else's
        pass
    except (OSError, OverflowError):
        return False
    found = _start_of(process)
    return found is None or started is None or found == started


def _start_of(process: int) -> str | None:
    """When a process started, as the kernel counts it; ``"ended"`` for one that has ended; None on other systems than Linux."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None if not Path("/proc/self/stat").exists() else "ended"
    fields = status.rpartition(")")[2].split()  # after the name of the program, which may hold anything
    return "ended" if fields[0] in "ZX" else fields[19]


def _make_parents(target: Path) -> None:
    """Creates the directories above ``target``, each with its name on disk."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names atomically, if the system can."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
