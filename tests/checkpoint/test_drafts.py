# SPDX-License-Identifier: Apache-2.0
"""Nothing is left behind: drafts of killed writers are removed, those of living ones are not."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_moefold.checkpoint import drafts
from lightning_moefold.checkpoint.drafts import draft_of, publish, remove_directory, sweep
from lightning_moefold.mesh import SINGLE


def killed_while(action: Callable[[], None]) -> int:
    """Runs ``action`` in a process that is killed once it has printed a byte; returns its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writing, 200)
            action()
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"."
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    return child


def _wait_to_be_killed() -> None:
    os.write(200, b".")
    time.sleep(60)


def _begin(target: Path) -> Callable[[], None]:
    def begin() -> None:
        with draft_of(target, SINGLE) as work:
            (work / "weights").write_bytes(b"half")
            _wait_to_be_killed()

    return begin


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _fill(target: Path, content: str) -> None:
    with draft_of(target, SINGLE) as work:
        (work / "weights").write_text(content)
        publish(work, target)


def test_a_killed_writer(tmp_path: Path) -> None:
    """Its draft is removed by the next sweep, and by the next save beside it."""
    _fill(tmp_path / "a.ckpt", "old")
    killed_while(_begin(tmp_path / "a.ckpt"))
    assert len(_names(tmp_path)) == 3
    assert sweep(tmp_path) == ["a.ckpt"]
    assert _names(tmp_path) == ["a.ckpt"]
    killed_while(_begin(tmp_path / "a.ckpt"))
    _fill(tmp_path / "b.ckpt", "new")
    assert _names(tmp_path) == ["a.ckpt", "b.ckpt"]
    assert (tmp_path / "a.ckpt" / "weights").read_text() == "old"


def test_a_living_writer(tmp_path: Path) -> None:
    """Drafts of this process, of another living process, and what has no lease stay."""
    (tmp_path / ".a.ckpt.0123abcd.tmp").mkdir()  # somebody else's name by chance
    with draft_of(tmp_path / "a.ckpt", SINGLE):
        before = _names(tmp_path)
        assert sweep(tmp_path) == []
        assert _names(tmp_path) == before
        lease = next(path for path in tmp_path.iterdir() if path.suffix == ".lease")
        os.utime(lease, (1, 1))  # a process that is stopped for long lives all the same
        assert sweep(tmp_path) == []
        held = json.loads(lease.read_text())
        lease.write_text(json.dumps(held | {"process": os.getppid(), "started": None}))
        assert sweep(tmp_path) == []
    assert _names(tmp_path) == [".a.ckpt.0123abcd.tmp"]


@pytest.mark.parametrize("age", [0.0, drafts.LIMIT - 30, drafts.LIMIT + 30])
def test_a_writer_on_another_machine(tmp_path: Path, age: float) -> None:
    """Its lease alone counts, renewed or not, although a process with its number runs here or has ended here."""
    work, lease = tmp_path / ".a.ckpt.0123abcd.tmp", tmp_path / ".a.ckpt.0123abcd.lease"
    for machine, process in ((["elsewhere"], os.getpid()), (["elsewhere"], 2**22 + 1)):
        work.mkdir(exist_ok=True)
        lease.write_text(json.dumps({"machine": machine, "process": process, "started": "1"}))
        os.utime(lease, (time.time() - age,) * 2)
        assert sweep(tmp_path) == (["a.ckpt"] if age > drafts.LIMIT else [])
        assert work.exists() == lease.exists() == (age < drafts.LIMIT)


def test_a_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "RENEWAL", 0.02)
    with draft_of(tmp_path / "a.ckpt", SINGLE):
        lease = next(path for path in tmp_path.iterdir() if path.suffix == ".lease")
        os.utime(lease, (1, 1))
        until = time.monotonic() + 20
        while lease.stat().st_mtime < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert lease.stat().st_mtime > 2
    assert _names(tmp_path) == []


def test_a_number_used_again(tmp_path: Path) -> None:
    """A living process with the number of the writer is not the writer if it started at another time."""
    lease = tmp_path / ".a.ckpt.0123abcd.lease"
    lease.write_text(json.dumps(drafts._myself() | {"started": "1"}))
    assert sweep(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    """At every moment there is the old content or the new one, and the sweep leaves nothing else."""
    if not exchange:
        monkeypatch.setattr(drafts, "_exchange", lambda *_: False)
    target = tmp_path / "a.ckpt"

    def replace_until(moment: int) -> Callable[[], None]:
        """The process is killed at its ``moment``-th call of the system."""

        def action() -> None:
            count = [0]

            def stop(function: Callable[..., object]) -> Callable[..., object]:
                def called(*arguments: object, **options: object) -> object:
                    count[0] += 1
                    if count[0] == moment:
                        _wait_to_be_killed()
                    return function(*arguments, **options)

                return called

            for place, name in ((drafts.os, "replace"), (drafts.shutil, "rmtree"), (drafts, "_exchange")):
                setattr(place, name, stop(getattr(place, name)))
            _fill(target, "new")
            _wait_to_be_killed()

        return action

    seen = set()
    for moment in range(1, 7):
        _fill(target, "old")
        killed_while(replace_until(moment))
        sweep(tmp_path)
        assert _names(tmp_path) == ["a.ckpt"], moment
        assert _names(target) == ["weights"], moment
        seen.add((target / "weights").read_text())
    assert seen == {"old", "new"}


def test_a_removal_is_not_seen_half_done(tmp_path: Path) -> None:
    target = tmp_path / "a.ckpt"

    def action() -> None:
        drafts.shutil.rmtree = lambda path: ((path / "weights").unlink(), _wait_to_be_killed())  # type: ignore[assignment]
        remove_directory(target)

    _fill(target, "old")
    killed_while(action)
    assert not target.exists()
    assert sweep(tmp_path) == ["a.ckpt"]
    assert _names(tmp_path) == []


def test_everything_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are synchronised before the rename, and the one that holds the name after it."""
    order: list[str] = []
    replace, sync = os.replace, drafts.sync_directory
    monkeypatch.setattr(drafts.os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    monkeypatch.setattr(drafts, "sync_directory", lambda path: (order.append(path.name), sync(path)))
    with draft_of(tmp_path / "new" / "a", SINGLE) as work:
        (work / "inner").mkdir()
        publish(work, tmp_path / "new" / "a")
    assert order == [tmp_path.name, "inner", work.name, "rename", "new"]
