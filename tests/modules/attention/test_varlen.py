# SPDX-License-Identifier: Apache-2.0
"""Runs of tokens that see each other, against the mask that blockwise attention goes by; the kernel itself is CUDA's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.modules.attention import varlen
from lightning_moefold.modules.attention.blockwise import Span, Visibility

CPU = torch.device("cpu")
LENGTH = 9


def _documents(kind: str) -> Tensor | None:
    rows = {"none": None, "some": [[0, 0, 0, 1, 1, 2, 2, 2, 2], [4] * 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]]}[kind]
    return None if rows is None else torch.tensor(rows)


def _padding(kind: str) -> Tensor | None:
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "left":
        real[0, :2], real[2, :7] = False, False
    elif kind == "right":
        real[1, 4:], real[2] = False, False
    elif kind == "between documents":
        real[0, 3:5] = False
    else:
        real[1, 4] = False
    return real


def _seen_by_runs(runs: varlen.Runs, window: int | None) -> Tensor:
    seen = torch.zeros(3 * LENGTH, 3 * LENGTH, dtype=torch.bool)
    for start, end in itertools.pairwise(runs.start_N1.tolist()):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        seen[start:end, start:end] = (distance >= 0) & (distance < (window or LENGTH))
    return seen


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padding", ["none", "left", "right", "between documents", "inside a document"])
@pytest.mark.parametrize("documents", ["none", "some"])
def test_runs_are_what_the_mask_shows(documents: str, padding: str, window: int | None) -> None:
    """Every token that is not padding sees the same keys."""
    document, real = _documents(documents), _padding(padding)
    visibility = Visibility(window, document, real)
    runs = visibility.runs(3, LENGTH, CPU)
    if padding in ("right", "inside a document") or (padding == "between documents" and documents == "none"):
        assert runs is None  # padding after a token sees that token, and is seen by none
        return
    assert runs is not None
    assert runs.longest == int(runs.start_N1.diff().max())
    row = Span(0, LENGTH)
    mask = visibility.of(row, row)
    mask = mask if isinstance(mask, Tensor) else torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    expected = torch.block_diag(*mask.expand(3, 1, LENGTH, LENGTH)[:, 0]).bool()
    real = torch.ones(3, LENGTH, dtype=torch.bool) if real is None else real
    assert torch.equal(_seen_by_runs(runs, window)[real.flatten()], expected[real.flatten()])


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows in its terms, grouped heads where it asks; the result of a kernel that computes run by run."""

    def by_run(
        q: Tensor, k: Tensor, v: Tensor, start_q: Tensor, start_k: Tensor, longest_q: int, longest_k: int,
        *, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert torch.equal(start_q, start_k)
        assert start_q.dtype == torch.int32
        assert longest_q == longest_k == int(start_q.diff().max())
        assert enable_gqa == (q.shape[1] != k.shape[1])
        left, right = window_size
        assert right == 0
        outputs = []
        for start, end in itertools.pairwise(start_q.tolist()):
            parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
            seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
            outputs.append(F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "_kernel", lambda: (by_run, {"enable_gqa": True}))
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, LENGTH, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    for window in (None, 3):
        visibility = Visibility(window, _documents("some"), None)
        runs = visibility.runs(3, LENGTH, CPU)
        assert runs is not None
        row = Span(0, LENGTH)
        mask = visibility.of(row, row)
        assert isinstance(mask, Tensor)
        parts = (x.transpose(1, 2) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(varlen.attend_within_runs(q, k, v, runs, window), expected)


def test_no_run_in_a_batch_without_rows() -> None:
    runs = varlen.find_runs(0, LENGTH, None, None, CPU)
    assert runs is not None
    assert runs.start_N1.tolist() == [0]
    assert runs.longest == 0
    assert not varlen.takes_runs(torch.zeros(0, LENGTH, 2, 8))


def test_the_kernel_is_there() -> None:
    """In every PyTorch that we support, with the arguments that we give it."""
    attend, grouped = varlen._kernel()
    assert callable(attend)
    assert grouped in ({}, {"enable_gqa": True})
