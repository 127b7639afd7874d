# SPDX-License-Identifier: Apache-2.0
"""Lets ranks call a model a different number of times, for prediction with unequal batches and texts of unequal length.

A forward pass is collective, so a rank with nothing left to compute would leave its peers waiting. Inside
:class:`JoinCalls` every call begins with one small all-reduce in which each rank says which model it is about to call.
A rank that has left takes part in the calls of the others with a *stand-in*, a batch in which no token is labelled,
counted or sent to an expert (for a block in a custom network: zero rows), until no rank calls any more. So the code
around the calls runs only for real data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_moefold import comm
from lightning_moefold.errors import BatchError, PeerError
from lightning_moefold.mesh import SINGLE

if TYPE_CHECKING:
    from lightning_moefold.modules.base import ParallelRoot


class JoinCalls:
    """A context in which each rank may call models any number of times, without gradients.

    Collective: every rank enters and leaves it. Inside, these models are the only collective calls.
    Leaving waits for the ranks that still call. If a rank leaves it with an error, the others raise
    a :class:`~.errors.PeerError` at their next call, unless the error came from the middle of a call, when they are inside it too.

    Args:
        models: All language models, or blocks of a custom network, that are called inside, in the same order on every
            rank; they must be parallelised over the same mesh.
    """

    def __init__(self, models: Sequence[ParallelRoot]) -> None:
        self._models = list(models)
        mesh = self._models[0].mesh
        self._world = SINGLE if mesh is None else mesh.world
        self._handles: list[RemovableHandle] = []
        self._standing_in = self._inside_call = self._over = False
        self._heard: BatchError | None = None

    def __enter__(self) -> Self:
        for index, model in enumerate(self._models):
            model.unequal = self
            if self._world.size > 1:
                # Before FSDP2's own hook, which gathers weights; registered even if unneeded, so that errors are seen.
                before = model.register_forward_pre_hook(partial(self._before_call, index), prepend=True)
                after = model.register_forward_hook(self._after_call, always_call=True)
                self._handles += [before, after]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                while (called := self._agree(None)) is not None:
                    self._stand_in(called)
            elif isinstance(error, Exception) and not self._inside_call and not self._over:
                with suppress(Exception):  # peers may be gone; the error being raised says more
                    self._agree(None, failed=True)
        finally:
            for handle in self._handles:
                handle.remove()
            for model in self._models:
                model.unequal = None
                # Only here, because all ranks must gather them again in the same call.
                model.release_gathered_weights()

    def _before_call(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._standing_in:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "calls in which other ranks may not take part have no backward; make them under torch.no_grad()."
            )
        while (called := self._agree(index)) != index:
            assert called is not None, "this rank's own call has been counted"
            self._stand_in(called)
        self._inside_call = True

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # All ranks raise a BatchError together, at the end of the call.
        self._inside_call = output is None and not isinstance(sys.exc_info()[1], BatchError)

    def _agree(self, index: int | None, failed: bool = False) -> int | None:
        """Agrees on the first model that any rank is about to call; None if no rank calls any more.

        Raises:
            PeerError: If another rank has failed.
        """
        device = next(self._models[0].parameters()).device
        votes = torch.zeros(len(self._models) + 1, dtype=torch.int64, device=device)
        if index is not None:
            votes[index] = 1
        votes[-1] = int(failed)
        *callers, failures = comm.all_reduce_raw(votes, self._world).tolist()
        if failures and not failed:
            self._over = True
            raise PeerError("another rank has failed; its own error says why.") from self._heard
        return next((i for i, count in enumerate(callers) if count), None)

    def _stand_in(self, index: int) -> None:
        """Takes part in a call of the other ranks."""
        self._standing_in = True
        try:
            with torch.no_grad():
                self._models[index].stand_in()
        except BatchError as error:  # an error in the calling rank's data, after which that rank may continue
            self._heard = error
        finally:
            self._standing_in = self._inside_call = False
