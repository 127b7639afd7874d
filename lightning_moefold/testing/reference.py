# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's own modelling code in any precision: the model that a parallel run is compared with."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def hf_reference(
    path: str | Path, *, dtype: torch.dtype = torch.float64, attn_implementation: str = "eager", **config_overrides: Any
) -> Any:
    """Loads a checkpoint into its ``transformers`` class, with nothing computed below ``dtype``.

    Stock code rounds to float32 in norms, router softmax, rotary tables, attention softmax, cross-entropy and the
    load-balancing loss. For a ``dtype`` above float32 this model does all of that in ``dtype``: while its ``forward``
    runs, each request for float32 is read as one for ``dtype``. Nothing outside the returned instance changes.

    Gradient checkpointing recomputes outside ``forward`` and must stay off.

    Args:
        path: Folder of the checkpoint.
        dtype: Data type of weights and computation. Up to float32 the code runs as it is.
        attn_implementation: ``"eager"`` or ``"sdpa"``.
        **config_overrides: Fields of the config to replace, such as ``output_router_logits=True``.

    Returns:
        The model, in evaluation mode, its experts computed one by one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, **config_overrides)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        experts_implementation="eager",
    )
    if dtype == torch.float64:
        _recompute_rotary_tables(model)
        # A bound method rather than a closure: a deep copy of the model binds it to the copy.
        model.forward = types.MethodType(_forward_lifted, model)
    return model


def lifted(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Returns a context in which code that rounds to float32 computes in ``max(float32, dtype)``."""
    return _ReadFloat32AsFloat64() if dtype == torch.float64 else nullcontext()


class _ReadFloat32AsFloat64(TorchFunctionMode):
    """Replaces float32 by float64 where a torch function is asked for it by name."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        arguments = [_lift(value) for value in args]
        named = {key: _lift(value) for key, value in (kwargs or {}).items()}
        return func(*arguments, **named)


def _lift(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _forward_lifted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _ReadFloat32AsFloat64():
        return type(self).forward(self, *args, **kwargs)


def _recompute_rotary_tables(model: nn.Module) -> None:
    """Replaces inverse frequencies, which are computed in float32 when the model is built."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        if not hasattr(module, "inv_freq"):
            continue
        rotary: Any = module
        default = rotary.rope_type == "default"
        compute = rotary.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[rotary.rope_type]
        with _ReadFloat32AsFloat64():
            frequencies, rotary.attention_scaling = compute(rotary.config)
        rotary.inv_freq = frequencies
        rotary.original_inv_freq = frequencies.clone()
