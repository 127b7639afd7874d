# SPDX-License-Identifier: Apache-2.0
"""The pool: results in rank order, failures and hangs that leave it usable, and cases independent of each other."""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_moefold.errors import InputError
from lightning_moefold.testing import PoolEnvironment, RankError, RankPool, RankTimeout
from lightning_moefold.testing.worker import RankFailure
from tests.quick import quick

#: Seconds that a rank sleeps; a machine under load needs minutes to end and start processes.
LONG = 3600


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(max_ranks=4) as pool:
        yield pool


def total(offset: float) -> dict[str, Any]:
    value = torch.tensor([offset + dist.get_rank()], requires_grad=True)
    with torch.no_grad():
        dist.all_reduce(value)
    return {"sum": value, "view": torch.arange(100)[10:12], "rank": int(os.environ["RANK"]), "pid": os.getpid()}


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("about to fail")
        raise ValueError(f"rank {rank} has a reason")
    dist.all_reduce(torch.ones(1))


def fail_while_others_sleep(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("missing")
    time.sleep(LONG)


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("going to sleep")
        time.sleep(LONG)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def leave_a_mess() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(dist.get_rank() + 1)
    random.seed(dist.get_rank() + 1)
    torch.set_num_threads(2)
    os.environ["LEFT_BEHIND"] = "1"


def observe_state() -> tuple[Any, ...]:
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    return dtype, grad, threads, torch.rand(()).item(), random.random(), "LEFT_BEHIND" in os.environ


def dtensor_sum(shape: tuple[int, ...]) -> float:
    """A mesh whose shape is the same in every case, but whose groups were created after ``shape``'s."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_device_mesh("cpu", shape)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    tensor = distribute_tensor(torch.arange(16.0).view(4, 4), mesh, [Shard(0), Shard(1)])
    total: Any = (tensor * 2).sum()
    return float(total.full_tensor())


def dtensor_entries(shape: tuple[int, ...] | None) -> int:
    """Returns the number of entries in the caches of DTensor's functions and methods, after a sum if a shape is given."""
    if shape is not None:
        dtensor_sum(shape)
    modules = [module for name, module in sys.modules.items() if name.startswith("torch.distributed.tensor")]
    values = [value for module in modules for value in vars(module).values()]
    values += [method for value in values if isinstance(value, type) for method in vars(value).values()]
    cached = type(functools.lru_cache(lambda: None))
    return sum(value.cache_info().currsize for value in values if type(value) is cached)


def return_a_dtensor() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()])


def fit_boring_model(root: str) -> tuple[int, int, bool]:
    import lightning as L
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        plugins=[PoolEnvironment()],
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    model = BoringModel()
    trainer.fit(model)
    weight = model.layer.weight.detach()
    gathered = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, weight)
    return trainer.global_rank, trainer.global_step, all(torch.equal(weight, other) for other in gathered)


class Cycle:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


_cycles: weakref.WeakSet[Cycle] = weakref.WeakSet()


def leave_a_cycle(module: str) -> int:
    """Returns how many there are, this one included."""
    importlib.import_module(module)
    held = Cycle()
    _cycles.add(held)
    return len(_cycles)


def refuse_devices() -> None:
    PoolEnvironment().validate_settings(num_devices=3, num_nodes=1)


@pytest.mark.parametrize("ranks", quick([1, 2, 4], 2))
def test_results_come_in_rank_order(pool: RankPool, ranks: int) -> None:
    results = pool.run(total, 1.0, ranks=ranks)
    assert [result["rank"] for result in results] == list(range(ranks))
    for result in results:
        assert torch.equal(result["sum"], torch.tensor([ranks + sum(range(ranks)) + 0.0]))
        assert not result["sum"].requires_grad
        assert result["view"].tolist() == [10, 11]
        assert result["view"].untyped_storage().nbytes() == 16
    assert len({result["pid"] for result in results}) == ranks


def test_processes_persist(pool: RankPool) -> None:
    first, second = (pool.run(total, 0.0, ranks=2) for _ in range(2))
    assert [result["pid"] for result in first] == [result["pid"] for result in second]


@pytest.mark.more
def test_failure_while_others_wait_in_a_collective(pool: RankPool) -> None:
    before = pool.run(total, 0.0, ranks=4)
    start = time.monotonic()
    with pytest.raises(RankError, match="fail_on") as caught:
        pool.run(fail_on, 2, ranks=4)
    assert time.monotonic() - start < LONG / 6
    assert next(iter(caught.value.failures)) == 2
    assert caught.value.exception_types[2] == "ValueError"
    assert caught.value.messages[2] == "rank 2 has a reason"
    assert "in fail_on" in caught.value.failures[2]
    assert "about to fail" in str(caught.value)
    after = pool.run(total, 0.0, ranks=4)
    assert before[2]["pid"] == after[2]["pid"]


def test_cases_do_not_see_each_other(pool: RankPool) -> None:
    expected = pool.run(observe_state, ranks=2)
    pool.run(leave_a_mess, ranks=2)
    assert pool.run(observe_state, ranks=2) == expected
    assert expected[0] == expected[1]
    assert expected[0][:3] == (torch.float32, True, 1)


@pytest.mark.more
def test_equal_meshes_of_different_groups(pool: RankPool) -> None:
    for shape in [(4,), (2, 2), (1, 4), (4,)]:
        assert pool.run(dtensor_sum, shape, ranks=4, timeout=30.0) == [240.0] * 4


def test_cached_decisions_of_a_case_end_with_it(pool: RankPool) -> None:
    """Those of DTensor, also when its module is hidden from the collector, after the case that imports it."""
    for _ in range(2):
        assert min(pool.run(dtensor_entries, (4,), ranks=4)) > 0
        assert max(pool.run(dtensor_entries, None, ranks=4)) == 0


def test_what_a_case_leaves_is_collected(pool: RankPool) -> None:
    """A cycle, made in a case that also imports a module, so that the next case hides what it imported."""
    assert pool.run(leave_a_cycle, "colorsys", ranks=1) == [1]
    assert pool.run(leave_a_cycle, "wave", ranks=1) == [1]
    assert pool.run(leave_a_cycle, "wave", ranks=1) == [1]


def test_environment_follows_the_parent(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_TEST_VARIABLE", "here")
    assert pool.run(os.getenv, "POOL_TEST_VARIABLE", ranks=1) == ["here"]
    monkeypatch.delenv("POOL_TEST_VARIABLE")
    assert pool.run(os.getenv, "POOL_TEST_VARIABLE", ranks=1) == [None]


def test_what_cannot_be_sent_is_refused(pool: RankPool) -> None:
    with pytest.raises(TypeError, match="top level"):
        pool.run(lambda: None, ranks=1)
    with pytest.raises(ValueError, match="max_ranks=4"):
        pool.run(total, 0.0, ranks=5)
    with pytest.raises(RankError, match="full_tensor"):
        pool.run(return_a_dtensor, ranks=1)


def test_a_closed_pool_refuses() -> None:
    pool = RankPool(1)
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(total, 0.0, ranks=1)


@pytest.mark.more
def test_lightning_trains_with_ddp(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(fit_boring_model, str(tmp_path), ranks=2) == [(0, 2, True), (1, 2, True)]
    with pytest.raises(RankError, match="is not the number of ranks"):
        pool.run(refuse_devices, ranks=1)


# The cases below end processes, whose restart takes seconds: they come last.


def test_failure_while_others_hang(pool: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="fail_while_others_sleep") as caught:
        pool.run(fail_while_others_sleep, 0, ranks=2)
    assert time.monotonic() - start < LONG / 6
    assert caught.value.exception_types == {0: "KeyError"}
    assert caught.value.hung == [1]
    assert "in fail_while_others_sleep" in str(caught.value).split("rank 1 was at")[1]


@pytest.mark.more
def test_death_of_a_process(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(die_on, 1, ranks=2)
    assert caught.value.exception_types[1] == "ProcessDied"
    assert "exit code 3" in caught.value.messages[1]


@pytest.mark.more
def test_deadline(pool: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankTimeout, match="hang_on.*ranks \\[1\\] of 2") as caught:
        pool.run(hang_on, 1, ranks=2, timeout=1.0)
    assert time.monotonic() - start < LONG / 6
    assert caught.value.unfinished == [1]
    assert "in hang_on" in caught.value.stacks[1]
    assert "going to sleep" in str(caught.value)
    assert len(pool.run(total, 0.0, ranks=2)) == 2


@pytest.mark.more
@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    script = (
        "import os, time; from lightning_moefold.testing import RankPool; pool = RankPool(1);"
        "print(pool.run(os.getpid, ranks=1)[0], flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process exists and is no zombie: an orphan may wait to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_error_that_a_user_can_mend() -> None:
    """Is that of the first rank that failed; another one tells of all ranks."""
    missing, lost = (RankFailure(kind, f"a {kind}", "...", 0.0) for kind in ("CheckpointError", "PeerError"))
    found = RankError("all", {1: missing, 0: lost}).for_user()
    assert isinstance(found, InputError)
    assert str(found) == "a CheckpointError"
    for failures in ({0: lost, 1: missing}, {0: RankFailure("KeyError", "'x'", "...", 0.0)}, {}):
        error = RankError("all", failures)
        assert error.for_user() is error
