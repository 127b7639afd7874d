# SPDX-License-Identifier: Apache-2.0
"""What autograd functions need so that ``torch.compile`` traces them rightly."""

from __future__ import annotations

import torch
from torch import Tensor


def unchanged(y: Tensor) -> Tensor:
    """Returns a result that an autograd function's forward has computed in place, so that its gradients are not lost.

    torch 2.11 traces a function that returns what an operation in place has returned, and silently drops its backward. A view
    of the result is traced rightly, and costs nothing in the compiled code. Outside of compilation this is ``y`` itself.
    """
    return y.view_as(y) if torch.compiler.is_compiling() else y
