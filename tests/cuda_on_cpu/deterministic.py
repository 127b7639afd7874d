# SPDX-License-Identifier: Apache-2.0
"""What CUDA refuses under ``torch.use_deterministic_algorithms(True)``; kernels of fake tensors refuse nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Beginnings of names of ATen's operations that raise, from the list in the function's documentation.
_REFUSED = (
    "avg_pool3d_backward", "_adaptive_avg_pool", "adaptive_avg_pool2d_backward", "adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool", "max_unpool", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad",
    "nll_loss2d", "_ctc_loss_backward", "put_", "put.", "histc", "kthvalue", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward", "_embedding_bag",
)  # fmt: skip


def is_refused(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether CUDA refuses a call, by the name of its operation (``cumsum.default``) and its arguments."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not any(x.is_cuda for x in tensors):
        return False
    if name.startswith(("cumsum", "cumprod", "logcumsumexp")):
        return tensors[0].is_floating_point()
    if name.startswith("scatter_reduce"):
        return "prod" in args
    if name.startswith("bincount"):
        return len(tensors) > 1
    if name.startswith(("median.dim", "nanmedian.dim")):
        return True
    return name.startswith(_REFUSED)


class Refusals(TorchDispatchMode):
    """Writes down what would be refused.

    Attributes:
        found: Names of operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        if is_refused(name if "." in name else f"{name}.default", args, kwargs or {}):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def sampling() -> dict[str, list[str]]:
    """Draws tokens in a deterministic run, and in another one."""
    from lightning_moefold.models.generation import Sampling, draw

    found = {}
    with FakeTensorMode():
        logits_BV = torch.empty(2, 64, dtype=torch.bfloat16, device="cuda")
        uniform_B = torch.empty(2, dtype=torch.float64, device="cuda")
        for mode in (True, False):
            torch.use_deterministic_algorithms(mode)
            try:
                with Refusals() as refusals:
                    token_B = draw(Sampling(top_k=9, top_p=0.5).probabilities(logits_BV), uniform_B)
            finally:
                torch.use_deterministic_algorithms(False)
            assert token_B.is_cuda
            found[str(mode)] = refusals.found
    return found
