# SPDX-License-Identifier: Apache-2.0
"""Which of the kernels behind ``scaled_dot_product_attention`` may run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Leaves out cuDNN's kernel in the context, as long as another one is allowed.

    Where PyTorch prefers cuDNN (Hopper and Blackwell with cuDNN newer than 9.15), each new shape costs the host tens of
    milliseconds for a plan, and plans are never freed. That is worth it for rows of one length, but not for rows that grow
    token by token, or whose padding differs from batch to batch.
    """
    allowed = cuda.cudnn_sdp_enabled()
    others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
    cuda.enable_cudnn_sdp(allowed and not others)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(allowed)
