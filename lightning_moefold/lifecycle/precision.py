# SPDX-License-Identifier: Apache-2.0
"""The precision plugin: Lightning's conversions, plus the fold's sums around backward and clipping."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moefold.errors import InputError
from lightning_moefold.lifecycle.step_check import StepCheck
from lightning_moefold.parallel import GradientNorm, GradientSum, local_part
from lightning_moefold.parallel.parameters import ParameterRegistry

SUPPORTED = ("32-true", "bf16-mixed", "bf16-true", "64-true")
_KINDS = {Precision, MixedPrecision, HalfPrecision, DoublePrecision}


class MoEFoldPrecision(Precision):
    """Wraps one of Lightning's precision plugins.

    In ``bf16-mixed``, FSDP2 casts a :class:`~lightning_moefold.MoECausalLM`, and autocast is off inside it; autocast
    covers the user's other modules.

    Args:
        inner: The plugin that Lightning chose for the Trainer's ``precision``.

    Raises:
        ValueError: If the precision cannot be exact under a fold; the message says what to use instead.

    Attributes:
        grad_norm: Global gradient norm before the latest clipping, or None.
        step_check: Check of losses and gradients before each optimizer step, or None.
    """

    def __init__(self, inner: Precision) -> None:
        super().__init__()
        if type(inner) not in _KINDS or inner.precision not in SUPPORTED:
            raise InputError(
                f"precision={inner.precision!r} ({type(inner).__name__}) does not work with MoEFoldStrategy, whose ranks would "
                f"scale or convert differently; use one of {', '.join(map(repr, SUPPORTED))}"
                + (" ('bf16-mixed' needs no loss scaling)." if str(inner.precision).startswith("16") else ".")
            )
        self.inner = inner
        self.precision = inner.precision
        self.loss_scale = 1.0
        self.gradient_sum = GradientSum(())
        self.gradient_norm: GradientNorm | None = None
        self.grad_norm: Tensor | None = None
        self.step_check: StepCheck | None = None

    def __getattr__(self, name: str) -> Any:
        """Returns what only Lightning's plugin has, such as ``device`` and ``scaler`` in mixed precision."""
        if name.startswith("_") or "inner" not in vars(self):  # a copy is asked before it has anything
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    @property
    def grad_norm_by_family(self) -> Tensor | None:
        """Gradient norms of the dense and the expert family before the latest clipping, ``[2]``; or None."""
        return None if self.gradient_norm is None else self.gradient_norm.by_family

    @property
    def mixed_dtype(self) -> torch.dtype | None:
        """The dtype in which FSDP2 computes, if it differs from the dtype of storage."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else None

    # ---- Lightning's own conversions ---------------------------------------------------------------------------

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return self.inner.convert_module(module)

    @override
    def tensor_init_context(self) -> AbstractContextManager:
        return self.inner.tensor_init_context()

    @override
    def module_init_context(self) -> AbstractContextManager:
        return self.inner.module_init_context()

    @override
    def forward_context(self) -> AbstractContextManager:
        return self.inner.forward_context()

    @override
    def convert_input(self, data: Any) -> Any:
        return self.inner.convert_input(data)

    @override
    def convert_output(self, data: Any) -> Any:
        return self.inner.convert_output(data)

    # ---- what a fold adds --------------------------------------------------------------------------------------

    def prepare(self, registry: ParameterRegistry, device: torch.device) -> None:
        """Learns the sums and norms of a module whose parameters are final."""
        self.loss_scale = 1.0 / registry.mesh.dp_cp.size
        self.gradient_sum = GradientSum(registry.unfinished_gradients())
        self.gradient_norm = GradientNorm(registry, device)

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        # The loss is that of this data rank, and its gradient is averaged over data ranks, as in plain Lightning.
        # Reductions are plain sums, so the factor of the average is applied here.
        if self.step_check is not None:
            self.step_check.saw_loss(tensor)
        with self.gradient_sum.around_backward():
            super().backward(tensor * self.loss_scale, model, optimizer, *args, **kwargs)

    @override
    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.step_check is not None:  # clipping spreads a NaN over all gradients
            self.step_check(optimizer, list(self.main_params(optimizer)))
        super()._clip_gradients(model, optimizer, *args, **kwargs)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self.gradient_norm is not None, "clipping happens after the strategy's setup"
        self.grad_norm = self.gradient_norm.clip(list(self.main_params(optimizer)), float(clip_val))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        for parameter in self.main_params(optimizer):
            if parameter.grad is not None:
                local_part(parameter.grad).clamp_(-clip_val, clip_val)

    @override
    def teardown(self) -> None:
        self.inner.teardown()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the strategy's set-up has added, which refers to process groups."""
        return {
            **vars(self),
            "gradient_sum": GradientSum(()),
            "gradient_norm": None,
            "grad_norm": None,
            "step_check": None,
        }
