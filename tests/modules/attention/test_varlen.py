# SPDX-License-Identifier: Apache-2.0
"""Runs of tokens that see each other, against the mask that blockwise attention goes by; the kernel itself is CUDA's."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_moefold.mesh import Axis
from lightning_moefold.modules import Attention
from lightning_moefold.modules.attention import context, varlen
from lightning_moefold.modules.attention.blockwise import Span, Visibility
from lightning_moefold.modules.attention.context import find_runs_of
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.sequence import SequenceBatch
from tests.modules.attention import one_device
from tests.modules.attention.flash_on_cpu import flash_on_cpu

CPU = torch.device("cpu")
LENGTH = 16


def _documents(kind: str) -> Tensor | None:
    rows = [[0] * 3 + [1] * 2 + [2] * 11, [4] * LENGTH, list(range(LENGTH))]
    return None if kind == "none" else torch.tensor(rows)


def _padding(kind: str) -> Tensor | None:
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "left":
        real[0, :2], real[2, :13] = False, False
    elif kind == "right":
        real[1, 4:], real[2] = False, False
    elif kind == "between documents":
        real[0, 3:5] = False
    else:
        real[1, 4] = False
    return real


def _seen_by_runs(runs: varlen.Runs, queries: int) -> Tensor:
    """``[queries, keys of all ranks]``, with the last query of each run aligned with its last key."""
    seen = torch.zeros(queries, 3 * LENGTH, dtype=torch.bool)
    keys = torch.arange(queries) if runs.key_K is None else runs.key_K
    for (a, c), (b, d) in itertools.pairwise(zip(runs.q_N1.tolist(), runs.k_N1.tolist(), strict=True)):
        for query in range(a, b):
            last = query - b + d
            seen[query, keys[max(c, last + 1 - (runs.window or LENGTH)) : last + 1]] = True
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("padding", ["none", "left", "right", "between documents", "inside a document"])
@pytest.mark.parametrize("documents", ["none", "some"])
def test_runs_are_what_the_mask_shows(documents: str, padding: str, window: int | None, ranks: int) -> None:
    """Every token that is not padding sees the same keys."""
    document, real = _documents(documents), _padding(padding)
    visibility = Visibility(window, document, real)
    row = Span(0, LENGTH)
    mask = visibility.of(row, row, CPU)
    mask = mask if isinstance(mask, Tensor) else torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask_BSS = mask.expand(3, 1, LENGTH, LENGTH)[:, 0]
    real = torch.ones(3, LENGTH, dtype=torch.bool) if real is None else real
    held_GL = ContextLayout(LENGTH, Axis("cp", tuple(range(ranks)))).held()
    for rank, place_L in enumerate(held_GL):
        runs = visibility.runs(3, held_GL, rank, CPU)
        if padding in ("right", "inside a document") or (padding == "between documents" and documents == "none"):
            assert runs is None  # padding after a token sees that token, and is seen by none
            continue
        assert runs is not None
        assert (runs.longest_q, runs.longest_k) == (int(runs.q_N1.diff().max()), int(runs.k_N1.diff().max()))
        seen_BLGBL = _seen_by_runs(runs, 3 * len(place_L)).view(3, len(place_L), ranks, 3, -1)
        for r in range(3):
            found_LGL = seen_BLGBL[r, :, :, r]
            assert seen_BLGBL[r].sum() == found_LGL.sum()  # no key of another row
            here = real[r, place_L]
            assert torch.equal(found_LGL.flatten(1)[here], mask_BSS[r, place_L][:, held_GL.flatten()][here])


def test_a_rank_takes_no_more_keys_than_its_queries_see() -> None:
    held_GL = ContextLayout(4096, Axis("cp", (0, 1, 2, 3))).held()
    number_of_keys = []
    for window, document_BS in ((None, None), (100, None), (None, torch.arange(4096)[None] // 512)):
        runs = [Visibility(window, document_BS).runs(1, held_GL, rank, CPU) for rank in range(4)]
        number_of_keys.append([len(each.key_K) for each in runs])  # type: ignore[union-attr, arg-type]
    # Chunks of 512; the last rank's two are neighbours, and what both see is taken once.
    assert number_of_keys == [[9 * 512] * 3 + [5 * 512], [1024 + 99] + [1024 + 2 * 99] * 2 + [1024 + 99], [1024] * 4]


@pytest.mark.parametrize("window", [None, 3])
def test_a_layer_calls_the_kernel_once(window: int | None) -> None:
    """In the order of heads and rows that a mask gives; forward, and its gradients."""
    torch.manual_seed(0)
    attention = Attention(24, 6, 2, 4, sliding_window=window, rope_theta=None).double()
    x = torch.randn(3 * LENGTH, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for kernel in (contextlib.nullcontext(), flash_on_cpu()):
        batch = SequenceBatch(3, LENGTH)
        batch.document_BS = _documents("some")
        with kernel as calls:
            y = attention(x, batch)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])))
    assert calls is not None
    assert calls.forward == calls.backward == [(3 * LENGTH, 3 * LENGTH)]
    assert not batch.visibility(window)._masks
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "window"), [("documents", 9), ("left", None)])
def test_ranks_on_one_device(kind: str, window: int | None, groups: int) -> None:
    """What ``tests/gpu`` asks of the real kernel."""
    with flash_on_cpu():
        sizes = {"length": 24, "heads": 4, "kv_heads": 2, "size": 8, "groups": groups}
        found = one_device.errors(kind, window, torch.float64, CPU, **sizes)
    assert max(found) < 1e-12


@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_are_found_on_the_host_whatever_the_default_device(ranks: int) -> None:
    layout = ContextLayout(LENGTH, Axis("cp", tuple(range(ranks))))
    found = []
    for default in ("cpu", "meta"):
        visibility = Visibility(3, _documents("some"), _padding("left"))
        with mock.patch.object(context, "takes_runs", return_value=True), torch.device(default):
            found.append(find_runs_of(torch.empty(3, 2, LENGTH // ranks, 8, device="cpu"), layout, visibility))
    assert found[0] is not None
    torch.testing.assert_close(found[1], found[0])


def test_no_run_in_a_batch_without_rows() -> None:
    for ranks in (1, 2):
        held_GL = ContextLayout(LENGTH, Axis("cp", tuple(range(ranks)))).held()
        runs = varlen.find_runs(0, held_GL, 0, None, None, 3, CPU)
        assert runs is not None
        assert runs.q_N1.tolist() == runs.k_N1.tolist() == [0]
        assert runs.longest_q == runs.longest_k == 0
    assert not varlen.takes_runs(torch.zeros(0, LENGTH, 2, 8))


def test_the_kernel_is_there() -> None:
    """In every PyTorch that we support, with the arguments that we give it."""
    for name, count in (("forward", 10), ("backward", 14)):
        schema = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema
        assert [a.kwarg_only for a in schema.arguments].index(True) == count
        assert {"window_size_left", "window_size_right"} < {a.name for a in schema.arguments}
