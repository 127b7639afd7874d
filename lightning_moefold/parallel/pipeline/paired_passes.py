# SPDX-License-Identifier: Apache-2.0
"""The forward of one micro-batch and the backward of another: the tokens of either travel while the other computes.

DualPipeV pairs a forward with a backward of the rank's other stage. torch runs the two one after the other, or hands the pair
to a function of ours. Here backward runs on a second thread, but never at the same time: a pass that is about to wait for a
handle (:mod:`.async_comm`) has the other go on, up to its own next wait. So what was sent is under way meanwhile, and the
order in which a rank asks for collectives depends on the layers of its two stages alone, never on data or on the clock: it is
the same on all ranks that share a stage, as NCCL wants it. The two passes use different parameters, and each computes what it
would alone in the same order, so results are bit-identical.

Both queue what they compute on the same CUDA stream. Where the host waits for the device (once per layer, for the sizes of the
exchange), it waits for what the other pass has queued too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_moefold.async_comm import Handle


class PartnerFailed(RuntimeError):
    """The other pass of a pair raised, and this one ends."""


class Turns:
    """Which of two threads runs; the one that makes this is first."""

    def __init__(self) -> None:
        self._first = threading.get_ident()
        self._condition = threading.Condition()
        self._runs_first, self._alone, self._failed = True, False, False
        self._in_one_go = False

    @property
    def _is_first(self) -> bool:
        # Not "is second": on CUDA, autograd runs the nodes of a backward on threads of its own.
        return threading.get_ident() == self._first

    def hand_over(self) -> None:
        """Lets the other one run until it hands over, or has ended.

        Raises:
            PartnerFailed: If it has failed.
        """
        mine = self._is_first
        with self._condition:
            if not self._alone and not self._in_one_go:
                self._runs_first = not mine
                self._condition.notify_all()
                self._wait_for(mine)

    def let_finish(self) -> None:
        """Of the first one: has the second run to its end."""
        with self._condition:
            if self._is_first and not self._alone:
                self._in_one_go, self._runs_first = True, False
                self._condition.notify_all()
                self._wait_for(first=True)

    def begin(self) -> None:
        """Waits for the second one's first turn."""
        with self._condition:
            self._wait_for(first=False)

    def end(self, *, failed: bool) -> None:
        """The caller takes no further turn."""
        with self._condition:
            self._runs_first, self._alone = not self._is_first, True
            self._failed = self._failed or failed
            self._condition.notify_all()

    def _wait_for(self, first: bool) -> None:
        self._condition.wait_for(lambda: self._failed or self._runs_first == first)
        if self._failed:
            raise PartnerFailed("the pass that was paired with this one failed; see its error.")


def _surroundings(device: torch.device) -> Callable[[], Any]:
    """Makes, on another thread, a context like that of this one."""
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    cached = torch.is_autocast_cache_enabled()
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            enabled, dtype = autocast
            stack.enter_context(torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=cached))
            for mode in modes:
                stack.enter_context(mode)
            yield

    return context


@contextmanager
def _served(turns: Turns) -> Iterator[None]:
    """Takes turns at every wait.

    A forward that differentiates something itself waits for the backward: on CUDA, autograd has one thread for a device, which a
    paused backward holds.
    """
    outside, differentiate = Handle.before_waiting, torch.autograd._engine_run_backward

    def differentiated(*args: Any, **kwargs: Any) -> Any:
        turns.let_finish()
        return differentiate(*args, **kwargs)

    Handle.before_waiting = staticmethod(turns.hand_over)
    torch.autograd._engine_run_backward = differentiated
    try:
        yield
    finally:
        Handle.before_waiting, torch.autograd._engine_run_backward = outside, differentiate


def take_turns(forward: Callable[[], Any], backward: Callable[[], None], device: torch.device) -> Any:
    """Runs both, ``backward`` on another thread, each up to its next wait for a collective.

    Args:
        forward: The first one.
        backward: Gets the autocast, the modes, the context variables and the stream of the caller.
        device: Of the tensors.

    Returns:
        What ``forward`` returned.

    Raises:
        Exception: What either raised; then the other one ends at its next turn.
    """
    turns, context, surroundings = Turns(), copy_context(), _surroundings(device)
    errors: list[BaseException] = []

    def run_backward() -> None:
        try:
            turns.begin()
            with surroundings():
                backward()
        except BaseException as error:
            errors.append(error)
        finally:
            turns.end(failed=bool(errors))

    thread = threading.Thread(target=context.run, args=(run_backward,), name="moefold backward", daemon=True)
    done = False
    with _served(turns):
        thread.start()
        try:
            result, done = forward(), True
        except Exception:
            if errors:  # and this is what came of it
                raise errors[0] from None
            raise
        finally:
            turns.end(failed=not done)
            # After an error it ends at its next turn, unless it waits for ranks that are gone.
            thread.join(timeout=None if done else 10)
    if errors:
        raise errors[0]
    return result


def pair_passes(schedule: Any) -> None:
    """Has a ``ScheduleDualPipeV`` of torch run the passes that it pairs by :func:`take_turns`."""
    from torch.distributed.pipelining.schedules import _ComputationType

    schedule.register_custom_function(_ComputationType.OVERLAP_F_B, _run_pair)


def _run_pair(action: Any, context: Any) -> None:
    """As torch's runtime performs the two actions, save that they take turns."""
    from torch.distributed.pipelining.schedules import _wait_batch_p2p

    schedule = context.schedule_ref
    stages = {stage.stage_index: stage for stage in schedule._stages}
    (ahead, number), (behind, back_number) = ((a.stage_index, a.microbatch_index) for a in action.sub_actions)
    forward_stage, backward_stage = stages[ahead], stages[behind]
    for stage in (forward_stage, backward_stage):
        schedule._assert_unsharded(stage)
    loss = schedule._maybe_get_loss(backward_stage, back_number)
    schedule.backward_counter[behind] += 1
    last = schedule.backward_counter[behind] == schedule._n_microbatches

    def forward() -> Any:
        if not forward_stage.is_first and ahead - 1 not in stages:
            _wait_batch_p2p(schedule.fwd_recv_ops.pop((ahead, number)))
        return forward_stage.forward_one_chunk(
            number, context.arg_mbs[number], context.kwarg_mbs[number], save_forward_output=False
        )

    def backward() -> None:
        if not backward_stage.is_last and behind + 1 not in stages:
            _wait_batch_p2p(schedule.bwd_recv_ops.pop((behind, back_number)))
        backward_stage.backward_one_chunk(back_number, loss=loss, full_backward=True, last_backward=last)

    output = take_turns(forward, backward, forward_stage.device)
    schedule._maybe_compute_loss(forward_stage, output, context.target_mbs, number)
    if ahead + 1 in stages:
        stages[ahead + 1].set_local_fwd_input(output, number)
    if behind - 1 in stages:
        stages[behind - 1].set_local_bwd_input(backward_stage.get_local_bwd_output(back_number), back_number)
