# SPDX-License-Identifier: Apache-2.0
"""Finds optimizers that are not elementwise by the operations of their step; only elementwise ones are exact under a fold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_moefold.errors import UnsupportedFeature
from lightning_moefold.optim.muon import Muon
from lightning_moefold.optim.stepping import step_inside

#: Operations that combine elements of a tensor (without the ``_`` of in-place ones); all of ``linalg`` does, too.
_COMBINING = frozenset(
    {
        "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "dot", "vdot", "norm",
        "sum", "nansum", "mean", "prod", "std", "std_mean", "var", "var_mean", "median", "nanmedian", "mode", "quantile",
        "aminmax", "amax", "amin", "argmax", "argmin", "logsumexp", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort",
        "argsort", "topk", "kthvalue", "cholesky", "cholesky_solve", "triangular_solve", "inverse", "geqrf", "ormqr",
        "lu_unpack", "convolution", "bincount", "histc", "unique", "_unique2", "_foreach_norm", "_foreach_powsum", "_foreach_max",
        "_foreach_mm",
    }
)  # fmt: skip
_BY_OVERLOAD = frozenset({"max.default", "max.dim", "min.default", "min.dim"})  # max.other is elementwise


class _Watch(TorchDispatchMode):
    """Raises at the first operation that combines elements."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if combines(func) and any(isinstance(x, Tensor) and x.numel() > 1 for x in tree_leaves((args, kwargs))):
            raise UnsupportedFeature(
                f"{self.kind} combines the elements of a tensor (by {func}), and a rank holds only pieces of parameters; "
                "use an optimizer that treats elements one by one, such as AdamW, SGD or Lion, or lightning_moefold.optim.Muon."
            )
        return func(*args, **kwargs)


def combines(func: Any) -> bool:
    """Whether an operation combines the elements of a tensor."""
    name, overload = func._schema.name.rpartition("::")[2], func._overloadname
    base = name if name.startswith("__") else name.rstrip("_")
    return base in _COMBINING or base.lstrip("_").startswith("linalg_") or f"{base}.{overload}" in _BY_OVERLOAD


@contextmanager
def elementwise_only(optimizer: Optimizer) -> Iterator[None]:
    """Watches the tensor operations of ``optimizer.step``, except those of its closure (forward, backward, clipping).

    Args:
        optimizer: The optimizer; its ``step`` is replaced inside the context.

    Raises:
        UnsupportedFeature: Raised by ``step`` if it combines elements, such as by a norm, a mean or a matrix product.
    """
    if isinstance(getattr(optimizer, "inner", optimizer), Muon):  # which gathers what it combines
        yield
        return
    watch = _Watch(type(optimizer).__name__)
    own = "step" in vars(optimizer)  # schedulers replace it by a wrapper
    step = optimizer.step
    optimizer.step = step_inside(step, watch)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            optimizer.step = step  # type: ignore[method-assign]
        else:
            del optimizer.step
