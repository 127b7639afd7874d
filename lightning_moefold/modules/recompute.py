# SPDX-License-Identifier: Apache-2.0
"""Activation recomputation: parts of a layer keep only their input and run again in backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_moefold.modules.experts.transformer_engine import recipe_contexts

_AGAIN: ContextVar[bool] = ContextVar("moefold_recomputing", default=False)


def is_recomputing() -> bool:
    """Whether this is the second run over the same tokens, which have then been counted already.

    Compiled code is the same in both runs, so there this is False, and counts must go through :func:`counted_once`.
    """
    return not torch.compiler.is_compiling() and _AGAIN.get()


@torch.library.custom_op("moefold::counted_once", mutates_args=())
def _counted_once(count: Tensor) -> Tensor:
    return torch.zeros_like(count) if _AGAIN.get() else count.clone()


@_counted_once.register_fake
def _(count: Tensor) -> Tensor:
    return torch.empty_like(count)


def counted_once(count: Tensor) -> Tensor:
    """Returns ``count``, or zeros in the second run over the same tokens.

    Compiled code needs this function, which is evaluated when it runs: a single graph serves both runs, keeps the same
    tensors for backward and needs no second compilation. Other code uses :func:`is_recomputing`, which costs no kernel.
    """
    return _counted_once(count) if torch.compiler.is_compiling() else count


class _Again(AbstractContextManager[None]):
    """The context of the second run; entered again by every backward of a retained graph."""

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
    """The identity on all outputs at once, which saves a tensor for backward.

    A function is recomputed when backward first reads one of its saved tensors. Which tensor this is may differ between
    ranks: on one rank the mask of a padded micro-batch in the routing statistics, on another an expert's input after a
    collective. Then collectives of the recomputation on one rank would meet those of backward on another. The tensor
    saved here is read first, on every rank.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.empty(0, dtype=torch.uint8))  # the default dtype may change before backward
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return grads


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function(*args)``, which returns a tensor or tuple of tensors, and keeps only the arguments for backward."""

    def outputs(*args: Any) -> Any:
        found = function(*args)
        return _RunAgainFirst.apply(*found) if isinstance(found, tuple) else _RunAgainFirst.apply(found)[0]

    # No early stop: it could leave out the last collectives on some ranks and not on others.
    with set_checkpoint_early_stop(False):
        return checkpoint(outputs, *args, use_reentrant=False, context_fn=_contexts)
