# SPDX-License-Identifier: Apache-2.0
"""Activation recomputation: parts of a layer keep only their input, and run again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Recompute = Literal["selective", "full"]

_AGAIN: ContextVar[bool] = ContextVar("moefold_recomputing", default=False)


def is_recomputing() -> bool:
    """Whether this is the second time that the same tokens come by: whoever counts them has counted them."""
    return _AGAIN.get()


@contextmanager
def _again() -> Iterator[None]:
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _again()


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of which only the arguments are kept for backward."""
    # Without the early stop: it would leave out the last collectives, on some ranks perhaps and on others not.
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts)
