# SPDX-License-Identifier: Apache-2.0
"""The part of ``transformer_engine.pytorch`` that experts use, on the CPU: its names, arguments, demands, and mathematics.

Written down from the sources of versions 2.9 and 2.20.0.dev0; where they differ it demands what both demand (arguments that both
take, counts as a list, a number of rows above zero to permute). Nothing is rounded to eight bits, so that padding and the rest
of the FP8 path can be held against an exact computation; float64 is taken, which the real one does not, for the same reason.

Legend: A tokens, M rows by expert, L experts, I and O widths in and out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moefold.modules.experts import transformer_engine as under_test

ALIGNMENT = 16  # of rows per expert in FP8, by delayed, current and block scaling

calls: list[str] = []
"""What was called since somebody cleared it; products with ``fp8`` or ``high`` precision."""


class FP8GlobalStateManager:
    enabled = False
    recipe: Any = None
    group: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls.recipe or SimpleNamespace(name="default", delayed=lambda: False)

    @classmethod
    def get_fp8_group(cls) -> Any:
        return cls.group


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Any = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe, state.group
    state.enabled, state.recipe, state.group = enabled, recipe, amax_reduction_group
    try:
        yield
    finally:
        state.enabled, state.recipe, state.group = before


@contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    calls.append("forward again" if recompute_phase else "forward to be run again")
    yield


# ---- products --------------------------------------------------------------------------------------------------------


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, counts: list[int], packed: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI, *weights)
        ctx.counts, ctx.packed = counts, packed
        return torch.cat([x @ w.t() for x, w in zip(x_MI.split(counts), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *weights = ctx.saved_tensors
        parts = grads[0].contiguous().split(ctx.counts)
        grad_x = torch.cat([g @ w for g, w in zip(parts, weights, strict=True)]) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[3]:
            return grad_x, None, None, *[None] * len(weights)
        if ctx.packed:  # newer versions
            grad_w = list(x_MI.new_empty(len(weights), *weights[0].shape))
        else:
            grad_w = [torch.empty_like(w) for w in weights]
        for g, x, w in zip(parts, x_MI.split(ctx.counts), grad_w, strict=True):
            torch.mm(g.t(), x, out=w)  # zero for an expert without rows
        return grad_x, None, None, *grad_w


class GroupedLinear(nn.Module):
    packed = True

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        assert not bias, "the stub has no bias"
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, device=device, dtype=params_dtype)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        assert isinstance(m_splits, list)
        assert all(type(n) is int for n in m_splits)
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        assert sum(m_splits) == inp.shape[0], "the kernels would read past the end"
        assert inp.dim() == 2
        assert inp.is_contiguous()
        for name, parameter in self.named_parameters():
            assert not parameter.is_meta, f"{name} has no storage"
            assert parameter.shape == (self.out_features, self.in_features)
            if inp.dtype != parameter.dtype:
                raise TypeError(f"Data types for parameters must match, {inp.dtype} and {name} {parameter.dtype}")
        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if fp8:
            assert all(n % ALIGNMENT == 0 for n in m_splits), "rows of each expert"
            assert self.in_features % 16 == 0, "last dimension of a weight"
            assert self.out_features % 8 == 0, "first dimension of a weight"
        calls.append("fp8" if fp8 else "high")
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return _GroupedLinear.apply(inp, m_splits, self.packed, *weights)


# ---- padding ---------------------------------------------------------------------------------------------------------


class _Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def padded(self, m_splits: list[int]) -> list[int]:
        assert isinstance(m_splits, list)
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        self.align_size = self.align_size or ALIGNMENT
        return [-(-n // self.align_size) * self.align_size for n in m_splits]


class Fp8Padding(_Padding):
    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        padded = self.padded(m_splits)
        if padded == m_splits:
            return inp, m_splits
        assert inp.dim() == 2
        assert inp.shape[0] == sum(m_splits)
        calls.append("pad")
        parts = zip(inp.view(-1, inp.shape[-1]).split(m_splits), m_splits, padded, strict=True)
        return torch.cat([nn.functional.pad(part, (0, 0, 0, m - n)) for part, n, m in parts]), padded


class Fp8Unpadding(_Padding):
    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        padded = self.padded(m_splits)
        if padded == m_splits:
            return inp
        assert inp.shape[0] == sum(padded)
        return torch.cat([part[:n] for part, n in zip(inp.split(padded), m_splits, strict=True)])


# ---- permutation -----------------------------------------------------------------------------------------------------


def _gather(x_AD: Tensor, map_AL: Tensor, rows: int) -> Tensor:
    """By the map of rows: first the numbers of a token's rows, then their experts, at the end how many there are."""
    y_MD = x_AD.new_full((rows, x_AD.shape[1]), torch.nan)
    for a, entries in enumerate(map_AL.tolist()):
        for m in entries[: entries[-1]]:
            y_MD[m] = x_AD[a]
    return y_MD


def _add(y_MD: Tensor, map_AL: Tensor) -> Tensor:
    total = y_MD.new_zeros(map_AL.shape[0], y_MD.shape[1], dtype=torch.promote_types(y_MD.dtype, torch.float32))
    for a, entries in enumerate(map_AL.tolist()):
        for m in entries[: entries[-1]]:
            total[a] += y_MD[m]
    return total.to(y_MD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, routing_map: Tensor, num_out_tokens: int) -> tuple[Tensor, Tensor]:
        experts = routing_map.shape[1]
        map_AL = torch.full((inp.shape[0], 2 * experts + 1), -1, dtype=torch.int32)
        map_AL[:, -1] = 0
        for m, (e, a) in enumerate(routing_map.t().nonzero().tolist()):
            n = int(map_AL[a, -1])
            map_AL[a, n], map_AL[a, experts + n], map_AL[a, -1] = m, e, n + 1
        ctx.save_for_backward(map_AL)
        ctx.mark_non_differentiable(map_AL)
        return _gather(inp, map_AL, num_out_tokens), map_AL

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _add(grads[0], *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, row_id_map: Tensor) -> Tensor:
        ctx.save_for_backward(row_id_map)
        ctx.rows = inp.shape[0]
        return _add(inp, row_id_map)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], *ctx.saved_tensors, ctx.rows), None


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    assert map_type == "mask", "the stub has masks only"
    assert inp.numel() > 0
    assert inp.shape[0] == routing_map.shape[0], "Permute not possible"
    assert routing_map.dtype == torch.int32
    assert 0 <= int(routing_map.min()) <= int(routing_map.max()) <= 1
    assert num_out_tokens > 0
    assert num_out_tokens == int(routing_map.sum()), "the kernel would write past the end, or leave rows unwritten"
    calls.append("permute")
    return _Permute.apply(inp, routing_map, num_out_tokens)


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
) -> Tensor:
    assert map_type == "mask"
    assert merging_probs is None
    assert probs is None
    assert restore_shape is not None, "the number of rows is not that of tokens"
    assert tuple(restore_shape) == (row_id_map.shape[0], inp.shape[1])
    return _Unpermute.apply(inp, row_id_map)


# ---- as a package ----------------------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Puts the stub where ``import transformer_engine.pytorch`` finds it, and forgets what was called."""
    root, te = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    quantization, distributed = (ModuleType(f"{te.__name__}.{name}") for name in ("quantization", "distributed"))
    for module, members in (
        (root, {"pytorch": te}),
        (te, {"quantization": quantization, "distributed": distributed, "autocast": autocast}),
        (te, {m.__name__: m for m in (GroupedLinear, Fp8Padding, Fp8Unpadding, moe_permute, moe_unpermute)}),
        (quantization, {"FP8GlobalStateManager": FP8GlobalStateManager, "autocast": autocast}),
        (distributed, {"activation_recompute_forward": activation_recompute_forward}),
    ):
        for name, member in members.items():
            setattr(module, name, member)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(under_test, "load", under_test.load.__wrapped__)  # the cache would outlive the stub
    calls.clear()
    return te
