# SPDX-License-Identifier: Apache-2.0
"""Experts of uneven widths in a few grouped products equal those that are computed one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.experts import buckets
from lightning_moefold.modules.experts.buckets import NARROWEST, make_buckets
from lightning_moefold.modules.experts.packed import PackedExperts
from lightning_moefold.modules.recompute import recomputed

HIDDEN = 16
WIDTHS = [40, 3, 0, 64, 9, 60, 1, 0, 33]
#: Rows of each expert: one without rows, one without rows or channels, a bucket without rows.
COUNTS = [[5, 0, 2, 7, 1, 3, 4, 0, 6], [5, 0, 2, 0, 0, 0, 0, 0, 6]]


def run(kernel: str, counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of tokens, router weights and the three stacks, of the same numbers for every kernel."""
    torch.manual_seed(0)
    experts = PackedExperts(HIDDEN, WIDTHS)
    rows = sum(counts)
    x_AD, weight_M, grad_AD = torch.randn(11, HIDDEN), torch.rand(rows), torch.randn(11, HIDDEN)
    token_M = torch.randint(11, (rows,))
    experts, x_AD = experts.to(dtype), x_AD.to(dtype).requires_grad_()
    weight_M = weight_M.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    experts.kernel = kernel
    y_AD = experts.compute(x_AD, ExpertRows(token_M, weight_M, torch.tensor(counts), distinct=False), experts.stacks())
    y_AD.backward(grad_AD.to(y_AD.dtype))
    found = [y_AD, x_AD.grad, weight_M.grad, *(p.grad for p in experts.parameters())]
    assert all(tensor is not None for tensor in found)
    return [tensor.detach().double() for tensor in found]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equal_to_one_after_the_other(counts: list[int], dtype: torch.dtype, bound: float) -> None:
    exact = run("loop", counts, torch.float64)
    for tensor, expected in zip(run("grouped_mm", counts, dtype), exact, strict=True):
        assert tensor.shape == expected.shape
        assert (tensor - expected).abs().max() <= bound * expected.abs().max()


def test_similar_widths_share_a_bucket() -> None:
    made = make_buckets(WIDTHS)
    assert made.experts == [[3, 5], [0, 8], [4], [1, 6]]
    assert made.widths == [64, 40, 16, 8]
    assert len(set(made.place_w.tolist())) == sum(WIDTHS)
    starts = [0, 64, 128, 168, 208, 224, 232]
    firsts = made.place_w[torch.tensor([0, 40, 43, 107, 116, 176, 177])].tolist()
    assert firsts == [starts[n] for n in (2, 5, 0, 4, 1, 6, 3)]
    widths = torch.randint(1, 2048, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    drawn = make_buckets(widths)
    for experts in drawn.experts[:-1]:
        assert min(widths[e] for e in experts) >= NARROWEST * max(widths[e] for e in experts)
    assert len(drawn.experts) <= 10


def test_padded_stacks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward keeps is the flat stacks, which are there anyway, rows, and products of the rows."""
    experts = PackedExperts(HIDDEN, [512, 500, 480])
    experts.kernel = "grouped_mm"
    kept: dict[int, int] = {}
    pack = buckets._Kept.pack

    def note(self: Any, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        if packed[0] is None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return packed

    monkeypatch.setattr(buckets._Kept, "pack", note)
    x_AD = torch.randn(4, HIDDEN, requires_grad=True)
    rows = ExpertRows(torch.arange(4), torch.ones(4), torch.tensor([2, 1, 1]), distinct=True)
    y_AD = experts.compute(x_AD, rows, experts.stacks())
    assert 2 * 4 * 512 * 4 <= sum(kept.values()) < 4 * 4 * 512 * 4
    y_AD.sum().backward()


def test_recomputation_drops_what_buckets_would_keep() -> None:
    """Hooks hide those around them: without care, recomputed experts kept their rows and products all the same."""
    asked: list[int] = []

    def away(tensor: Tensor) -> tuple[int, Tensor]:
        asked.append(tensor.untyped_storage().nbytes())
        return tensor._version, tensor.clone()

    experts = PackedExperts(HIDDEN, [512, 500, 480])
    experts.kernel = "grouped_mm"
    rows = ExpertRows(torch.arange(4), torch.ones(4), torch.tensor([2, 1, 1]), distinct=True)
    found = []
    for again in (False, True):
        experts.zero_grad()
        x_AD = torch.ones(4, HIDDEN).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(away, lambda kept: kept[1]):
            if again:
                y_AD = recomputed(experts.compute, x_AD, rows, experts.stacks())
            else:
                y_AD = experts.compute(x_AD, rows, experts.stacks())
        assert (max(asked) >= 2 * 512 * 4) is not again, "products were kept"
        assert max(asked) < 512 * HIDDEN * 4, "weights were kept"
        y_AD.square().sum().backward()
        found.append([x_AD.grad, *(p.grad.clone() for p in experts.parameters())])
        asked.clear()
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
