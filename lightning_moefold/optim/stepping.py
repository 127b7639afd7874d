# SPDX-License-Identifier: Apache-2.0
"""Runs a dispatch mode inside an optimizer's step, but not inside its closure (forward, backward, clipping)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[..., Any]


def step_inside(step: Step, mode: TorchDispatchMode) -> Step:
    """Wraps an optimizer's ``step`` to run inside ``mode``, except for its closure.

    Returns:
        A function of the optional closure.
    """

    def stepped(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        def outside() -> Any:
            assert closure is not None
            mode.__exit__(None, None, None)
            try:
                return closure()
            finally:
                mode.__enter__()

        with mode:
            return step(closure=outside, **kwargs) if closure is not None else step(**kwargs)

    return stepped
