# SPDX-License-Identifier: Apache-2.0
"""Ranks that start once and run many distributed test cases.

Starting a rank costs seconds of imports, running a small case milliseconds. :class:`RankPool` therefore keeps its
processes, and builds and destroys a process group for every case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection as mp_connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from typing_extensions import Self

from lightning_moefold import errors
from lightning_moefold.errors import InputError
from lightning_moefold.testing.worker import LOOPBACK, Outcome, RankFailure, Request

_START_SECONDS = 300.0  # to import torch and the function's module; machines with few cores start ranks in turn
_GRACE_SECONDS = 3.0  # for the other ranks, once one has failed
_SETTLE_SECONDS = 30.0  # to destroy the process group
_FAILED_SETTLE_SECONDS = 10.0  # the same after a failure, after which the rank can be replaced
_TAIL_BYTES = 4000

_BOOTSTRAP = """
import json, sys
sys.path[:], fd, parent, traces = json.loads(sys.argv[1])
from lightning_moefold.testing.worker import main
main(fd, parent, traces)
"""


class RankError(RuntimeError):
    """At least one rank raised, or its process died.

    Attributes:
        failures: Rank to traceback text, in the order in which the ranks failed: the first is the likely cause, later
            ones often only report that their peer went away.
        exception_types: Rank to the name of the exception's class (``"ProcessDied"`` for a process that ended).
        messages: Rank to the exception's message.
        hung: Ranks that neither finished nor raised after a peer had failed; they were killed.
    """

    def __init__(self, text: str, failures: dict[int, RankFailure], hung: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.failures = {rank: failure.traceback for rank, failure in failures.items()}
        self.exception_types = {rank: failure.exception_type for rank, failure in failures.items()}
        self.messages = {rank: failure.message for rank, failure in failures.items()}
        self.hung = list(hung)

    def for_user(self) -> Exception:
        """Returns the error of the first rank that failed, if a user can mend it; otherwise this one, which tells of all ranks."""
        rank = next(iter(self.exception_types), None)
        kind = None if rank is None else getattr(errors, self.exception_types[rank], None)
        if rank is None or kind is None or not issubclass(kind, InputError):
            return self
        return InputError(self.messages[rank])


class RankTimeout(TimeoutError):
    """A case missed its deadline; all ranks were killed.

    Attributes:
        unfinished: Ranks that had not finished.
        stacks: Rank to the Python stacks of its threads at the deadline (empty text if it could not answer).
    """

    def __init__(self, text: str, stacks: dict[int, str]) -> None:
        super().__init__(text)
        self.unfinished = list(stacks)
        self.stacks = stacks


class RankPool:
    """Persistent processes that run functions as the ranks of a gloo process group on this machine.

    Use it as a context manager, or close it; at the parent's exit it closes itself, and on Linux its processes die
    with the parent however that ends. Needs a POSIX system. One case runs at a time; not thread-safe, and on Linux
    the thread that starts the ranks must outlive them (the kernel's parent-death signal follows the thread).

    Args:
        max_ranks: Largest number of ranks a case may ask for. Processes start when a case first needs them.
        threads_per_rank: Intra-operator threads of each rank.

    Example::

        def total(value: float) -> float:          # at the top level of a module
            tensor = torch.tensor(value * dist.get_rank())
            dist.all_reduce(tensor)
            return tensor.item()

        with RankPool() as pool:
            assert pool.run(total, 2.0, ranks=3) == [6.0, 6.0, 6.0]
    """

    def __init__(self, max_ranks: int = 8, *, threads_per_rank: int = 1) -> None:
        if max_ranks < 1 or threads_per_rank < 1:
            raise InputError(f"max_ranks={max_ranks} and threads_per_rank={threads_per_rank} must be at least 1")
        self.max_ranks = max_ranks
        self.threads_per_rank = threads_per_rank
        self._workers: dict[int, _Worker] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="moefold-ranks-"))
        self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._folder)

    def run(self, fn: Callable[..., Any], *args: Any, ranks: int, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Calls ``fn(*args, **kwargs)`` on every rank of a fresh gloo group and returns the results.

        Each rank sees ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
        ``MASTER_PORT``, otherwise the parent's environment, import path and working directory; default dtype, grad
        mode, threads and random seeds are reset before each case.

        Args:
            fn: A function that can be imported: top level in a module other than ``__main__``.
            *args: Picklable arguments.
            ranks: Number of ranks.
            timeout: Deadline in seconds, without the time to start processes and to import the function's module.
            **kwargs: Picklable keyword arguments.

        Returns:
            One result per rank, in rank order. Tensors in it are detached CPU copies.

        Raises:
            RankError: If a rank raised or died.
            RankTimeout: If the deadline passed.
            TypeError: If the function or its arguments cannot be sent.
            ValueError: If ``ranks`` is not between 1 and ``max_ranks``.
            RuntimeError: If the pool is closed.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the pool is closed")
        if not 1 <= ranks <= self.max_ranks:
            raise InputError(f"ranks={ranks} is not in [1, max_ranks={self.max_ranks}]")
        call = _pickle_call(fn, args, kwargs)
        name = _name(fn)
        store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        template = Request(
            rank=0,
            world_size=ranks,
            store_port=store.port,
            master_port=_free_port(),
            timeout=timeout + 60,  # the pool's deadline comes first, since it can say which ranks hang and where
            threads=self.threads_per_rank,
            module=_module_of(fn),
            call=call,
            environ=dict(os.environ),
            sys_path=[os.path.abspath(entry) for entry in sys.path],
            cwd=os.getcwd(),
        )
        try:
            return self._run_case(name, template, timeout)
        except (RankError, RankTimeout):
            raise
        except BaseException:  # an interrupt leaves the ranks in an unknown state
            self._kill_all()
            raise
        finally:
            del store

    def close(self) -> None:
        """Ends all processes and removes their temporary files. Harmless when repeated."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run_case(self, name: str, template: Request, timeout: float) -> list[Any]:
        """Walks one case through start, load, go and finish."""
        workers = self._start(name, template.world_size)
        for rank, worker in workers.items():
            worker.begin(dataclasses.replace(template, rank=rank))
        self._check(f"importing {name}", workers, _collect(workers, _START_SECONDS), _START_SECONDS)
        for worker in workers.values():
            worker.send("go")
        outcomes = _collect(workers, timeout)
        self._check(name, workers, outcomes, timeout)
        self._finish(f"destroying the process group of {name}", workers)
        return [pickle.loads(outcomes[rank].payload or b"") for rank in workers]

    def _start(self, name: str, ranks: int) -> dict[int, _Worker]:
        """Returns the first ``ranks`` workers, after starting those that are not alive."""
        fresh = {}
        for rank in range(ranks):
            if rank in self._workers and self._workers[rank].alive():
                continue
            if rank in self._workers:
                self._workers.pop(rank).kill()
            fresh[rank] = self._workers[rank] = _Worker(self._folder, rank, self.threads_per_rank)
        outcomes = _collect(fresh, _START_SECONDS)
        self._check(f"starting ranks for {name}", fresh, outcomes, _START_SECONDS, in_case=False)
        return {rank: self._workers[rank] for rank in range(ranks)}

    def _check(
        self,
        name: str,
        workers: dict[int, _Worker],
        outcomes: dict[int, Outcome],
        timeout: float,
        *,
        in_case: bool = True,
    ) -> None:
        """Returns if all ranks succeeded; otherwise brings the pool into a usable state and raises.

        Args:
            name: Description of the ranks' activity, for the error.
            workers: The ranks asked.
            outcomes: Their answers so far.
            timeout: Their deadline in seconds.
            in_case: Whether a rank that has answered waits for the case to be finished.
        """
        failed = [(rank, outcome.failure) for rank, outcome in outcomes.items() if outcome.failure is not None]
        failures = dict(sorted(failed, key=lambda item: item[1].when))
        missing = {rank: worker.stacks() for rank, worker in workers.items() if rank not in outcomes}
        if not failures and not missing:
            return
        outputs = {rank: worker.tail() for rank, worker in workers.items() if rank in failures or rank in missing}
        if not failures:
            self._kill_all()
            raise RankTimeout(_timeout_text(name, timeout, len(workers), missing, outputs), missing)
        for rank in missing:
            self._workers.pop(rank).kill()
        if in_case:
            self._finish(name, {rank: worker for rank, worker in workers.items() if rank in outcomes}, strict=False)
        raise RankError(_error_text(name, len(workers), failures, missing, outputs), failures, list(missing))

    def _finish(self, name: str, workers: dict[int, _Worker], *, strict: bool = True) -> None:
        """Ends the case on the given ranks, and kills those that do not answer.

        Args:
            name: Name of the case, for the error.
            workers: The ranks that have answered.
            strict: Whether a rank that does not answer is an error.
        """
        for worker in workers.values():
            worker.send("finish")
        outcomes = _collect(workers, _SETTLE_SECONDS if strict else _FAILED_SETTLE_SECONDS)
        if strict:
            self._check(name, workers, outcomes, _SETTLE_SECONDS, in_case=False)
        for rank in workers:
            if rank not in outcomes or outcomes[rank].failure is not None:
                self._workers.pop(rank).kill()

    def _kill_all(self) -> None:
        for rank in list(self._workers):
            self._workers.pop(rank).kill()


class _Worker:
    """One rank's process as its parent sees it."""

    def __init__(self, folder: Path, rank: int, threads: int) -> None:
        self._log = folder / f"rank{rank}.log"
        self._traces = folder / f"rank{rank}.stacks"
        self._log.write_bytes(b"")
        self._log_start = 0
        self.connection, child = mp_connection.Pipe()
        arguments = [[os.path.abspath(entry) for entry in sys.path], child.fileno(), os.getpid(), str(self._traces)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOTSTRAP, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[child.fileno()],
                start_new_session=True,  # the terminal's interrupt is the parent's to handle; grandchildren die with it
            )
        child.close()

    def alive(self) -> bool:
        return self._process.poll() is None

    def begin(self, request: Request) -> None:
        """Sends a case, and remembers where its output begins."""
        self._log_start = self._log.stat().st_size
        self.send(request)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the process is dead, which the next receive reports
            self.connection.send_bytes(pickle.dumps(message))

    def receive(self) -> Outcome:
        """Reads the answer to the last message; a process that ended counts as a failure."""
        try:
            outcome = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
            message = f"the process ended with exit code {code}"
            return Outcome(failure=RankFailure("ProcessDied", message, message, time.monotonic()))
        assert isinstance(outcome, Outcome)
        return outcome

    def tail(self) -> str:
        """Returns the end of what this case has written to stdout and stderr."""
        with open(self._log, "rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - _TAIL_BYTES))
            return log.read().decode(errors="replace").strip()

    def stacks(self, seconds: float = 2.0) -> str:
        """Returns the Python stacks of the process's threads, or empty text if it does not answer in time."""
        if not self.alive() or not self._traces.exists():  # without a handler, the signal would kill it
            return ""
        start = size = self._traces.stat().st_size
        os.kill(self._process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.05)
            previous, size = size, self._traces.stat().st_size
            if size > start and size == previous:
                break
        with open(self._traces, "rb") as traces:
            traces.seek(start)
            return traces.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """Ends the process and what it has started (its session's group, which is its own), and reaps it."""
        if self.alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        self._process.wait()
        self.connection.close()


def _collect(workers: dict[int, _Worker], seconds: float) -> dict[int, Outcome]:
    """Waits for one answer of each worker.

    Args:
        workers: Workers by rank.
        seconds: Deadline. After a failure only a short grace period remains, because peers of a failed rank may wait
            forever.

    Returns:
        The answers that came in time, by rank.
    """
    deadline = time.monotonic() + seconds
    waiting: dict[Any, int] = {worker.connection: rank for rank, worker in workers.items()}
    outcomes: dict[int, Outcome] = {}
    while waiting:
        ready = mp_connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            outcomes[rank] = workers[rank].receive()
            if outcomes[rank].failure is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return outcomes


def _shut_down(workers: dict[int, _Worker], folder: Path) -> None:
    for rank in list(workers):
        workers.pop(rank).kill()
    shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def _unwrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _name(fn: Callable[..., Any]) -> str:
    fn = _unwrap(fn)
    return f"{fn.__module__}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def _module_of(fn: Callable[..., Any]) -> tuple[str, str | None]:
    name = _unwrap(fn).__module__
    return name, getattr(sys.modules.get(name), "__file__", None)


def _pickle_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    if _unwrap(fn).__module__ == "__main__":
        raise TypeError(f"{_name(fn)} cannot be imported by the ranks: move it into a module")
    try:
        return pickle.dumps((fn, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{_name(fn)} or its arguments cannot be sent to the ranks (the function must be at the top level of a "
            f"module, its arguments picklable): {error}"
        ) from error


def _error_text(
    name: str, ranks: int, failures: dict[int, RankFailure], hung: dict[int, str], outputs: dict[int, str]
) -> str:
    lines = [f"{name}: {len(failures)} of {ranks} ranks failed (the first to fail comes first)"]
    for rank, failure in failures.items():
        lines += [f"--- rank {rank}: {failure.exception_type}: {failure.message}", failure.traceback.rstrip()]
        lines += _output_lines(rank, outputs)
    if hung:
        lines += [f"ranks {list(hung)} neither finished nor failed, and were killed", *_stack_lines(hung, outputs)]
    return "\n".join(lines)


def _timeout_text(name: str, timeout: float, ranks: int, stacks: dict[int, str], outputs: dict[int, str]) -> str:
    head = f"{name}: ranks {list(stacks)} of {ranks} had not finished after {timeout:g} s; all ranks were killed"
    return "\n".join([head, *_stack_lines(stacks, outputs)])


def _stack_lines(stacks: dict[int, str], outputs: dict[int, str]) -> list[str]:
    lines = []
    for rank, stack in stacks.items():
        lines += [f"--- rank {rank} was at", stack or "(no answer)", *_output_lines(rank, outputs)]
    return lines


def _output_lines(rank: int, outputs: dict[int, str]) -> list[str]:
    return [f"--- rank {rank} wrote", outputs[rank]] if outputs.get(rank) else []
