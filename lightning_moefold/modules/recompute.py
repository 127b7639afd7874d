# SPDX-License-Identifier: Apache-2.0
"""Activation recomputation: parts of a layer keep only their input, and run again in backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_moefold.modules.experts.transformer_engine import recipe_contexts

Recompute = Literal["selective", "full"]

_AGAIN: ContextVar[bool] = ContextVar("moefold_recomputing", default=False)


def is_recomputing() -> bool:
    """Whether this is the second time that the same tokens come by: whoever counts them has counted them.

    Compiled code is the same both times, so there this is False, and what is counted goes through :func:`counted_once`.
    """
    return not torch.compiler.is_compiling() and _AGAIN.get()


@torch.library.custom_op("moefold::counted_once", mutates_args=())
def _counted_once(count: Tensor) -> Tensor:
    return torch.zeros_like(count) if _AGAIN.get() else count.clone()


@_counted_once.register_fake
def _(count: Tensor) -> Tensor:
    return torch.empty_like(count)


def counted_once(count: Tensor) -> Tensor:
    """``count``, or zeros where the same tokens come by again.

    For compiled code, which asks when it runs: one graph for both times keeps the same tensors for backward, and makes no
    second compilation. Elsewhere ask :func:`is_recomputing`, which costs no kernel.
    """
    return _counted_once(count) if torch.compiler.is_compiling() else count


class _Again(AbstractContextManager[None]):
    """Around what runs again; entered once more by every backward of a graph that is kept.

    Args:
        recipe: Makes the context of the first time.
    """

    def __init__(self, recipe: Callable[[], AbstractContextManager[Any]]) -> None:
        self._recipe = recipe

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._stack.callback(_AGAIN.reset, _AGAIN.set(True))
        self._stack.enter_context(self._recipe())

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    first, recipe = recipe_contexts()
    return first, _Again(recipe)


class _RunAgainFirst(torch.autograd.Function):
    """The identity, of all outputs at once, with something saved.

    A function runs again when backward first asks for something that it saved. Which that is may differ between ranks: the
    mask of a padded micro-batch in the routing statistics of one, an expert's input, behind a collective, of another. Then
    collectives of the second forward and of backward would meet. This one is asked first, on every rank.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.empty(0, dtype=torch.uint8))  # the default dtype may be another later
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return grads


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, a tensor or a tuple of tensors, of which only the arguments are kept for backward."""

    def outputs(*args: Any) -> Any:
        found = function(*args)
        return _RunAgainFirst.apply(*found) if isinstance(found, tuple) else _RunAgainFirst.apply(found)[0]

    # Without the early stop: it would leave out the last collectives, on some ranks perhaps and on others not.
    with set_checkpoint_early_stop(False):
        return checkpoint(outputs, *args, use_reentrant=False, context_fn=_contexts)
