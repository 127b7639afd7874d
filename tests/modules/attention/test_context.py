# SPDX-License-Identifier: Apache-2.0
"""Context parallel attention and attention by blocks: exact for every exchange and mask (float64)."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention import exchanges, head_groups
from lightning_moefold.modules.attention.blockwise import Seen, Span, Visibility, block_backward, block_forward
from lightning_moefold.modules.attention.context import choose_exchange
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.testing import RankError, RankPool, assert_close_by_name
from tests.modules.attention import jobs_context
from tests.quick import quick

CPU = torch.device("cpu")
MASKS: list[dict[str, Any]] = [
    {},
    {"documents": True},
    {"window": 5},
    {"padding": True},
    {"documents": True, "window": 3, "padding": True},
]

BOTH = {"documents": True, "padding": True}


def check(pool: RankPool, ranks: int, *cases: dict[str, Any]) -> None:
    for case, *parts in zip(cases, *pool.run(jobs_context.attend_each, list(cases), ranks=ranks), strict=True):
        expected = jobs_context.naive(case)
        found = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
        for part in parts:
            for name, whole in found.items():
                whole[:, :, part["place"]] = part[name]
        assert_close_by_name(found, expected, 1e-12, str(case))


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all", "auto"])
@pytest.mark.parametrize("mask", quick(MASKS, MASKS[0], MASKS[-1]), ids=str)
@pytest.mark.parametrize(("ranks", "kv_heads"), quick([(2, 2), (4, 4), (4, 8)], (4, 4)))
def test_over_ranks(pool: RankPool, ranks: int, kv_heads: int, mask: dict[str, Any], exchange: str) -> None:
    check(pool, ranks, {"length": 24, "heads": 8, "kv_heads": kv_heads, "block": 2, "exchange": exchange, **mask})


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
@pytest.mark.parametrize("mask", quick([MASKS[0], MASKS[-1]], MASKS[-1]), ids=str)
@pytest.mark.parametrize("message", [1, 2 * 2 * 2 * 6 * jobs_context.SIZE * 8], ids=["a head", "two heads of three"])
@pytest.mark.more
def test_some_heads_after_the_others(pool: RankPool, message: int, mask: dict[str, Any], exchange: str) -> None:
    """Six positions on a rank, two rows, float64: the second size is keys and values of two heads, exactly."""
    shape = {"length": 24, "heads": 6, "kv_heads": 3, "block": 2, "message": message, "exchange": exchange}
    check(pool, 4, {**shape, **mask})
    layout = ContextLayout(24, Axis("cp", (0, 1, 2, 3)))
    q, k = (torch.empty(2, heads, 6, jobs_context.SIZE, dtype=torch.float64) for heads in (6, 3))
    with mock.patch.object(exchanges, "MESSAGE_BYTES", message):
        groups = head_groups._head_groups(q, k, layout)
    assert [kv.stop - kv.start for _, kv in groups] == ([1, 1, 1] if message == 1 else [2, 2])
    assert torch.cat([k[0, kv, 0, 0] for _, kv in groups]).numel() == 3


@pytest.mark.parametrize("mask", MASKS[1:], ids=str)
@pytest.mark.parametrize("block", quick([1, 3, 4, 100], 3))
def test_by_blocks_on_one_rank(pool: RankPool, block: int, mask: dict[str, Any]) -> None:
    check(pool, 1, {"length": 11, "heads": 4, "kv_heads": 2, "block": block, "exchange": "auto", **mask})


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize(
    "mask",
    quick([{"documents": True}, {"padding": True}, BOTH], BOTH),
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_one_row_needs_no_mask(pool: RankPool, ranks: int, mask: dict[str, Any], exchange: str) -> None:
    """It is cut where documents and padding begin, and each pair of pieces is seen whole, up to its own place or not at all."""
    case = {"rows": 1, "length": 24, "heads": 8, "kv_heads": 4, "shortest": 1, "exchange": exchange, "unmasked": True}
    check(pool, ranks, {**case, **mask})


RUNS: list[dict[str, Any]] = [
    {"documents": True},
    {"window": 3},
    {"window": 4},
    {"window": 17},
    {"padding": "left"},
    {"documents": True, "window": 3, "padding": "left"},
    {"documents": True, "window": 20},
    {"window": 5, "padding": "left", "rows": 1},
]


@pytest.mark.parametrize("ranks", quick([2, 4], 4))
def test_one_kernel_for_all_rows(pool: RankPool, ranks: int) -> None:
    """On CUDA (here as loops), whatever hides keys: windows shorter and longer than a piece of a row, which has 4 positions on
    four ranks; several documents and paddings. No mask is built, and where a ring would go around blocks, keys are gathered."""
    shape = {"length": 32, "heads": 4, "kv_heads": 2, "rows": 3, "unmasked": True, "calls": 1, "small": 0}
    gathered = [{**shape, "exchange": "auto", **mask} for mask in RUNS]
    exchanged = [{**shape, "exchange": "all_to_all", "heads": 8, "kv_heads": 4, **mask} for mask in RUNS[-3:]]
    check(pool, ranks, *gathered, {**gathered[0], "exchange": "all_gather"}, *exchanged)


@pytest.mark.parametrize("ranks", quick([2, 4], 2))
def test_the_kernel_by_heads_and_where_it_does_not_apply(pool: RankPool, ranks: int) -> None:
    """One call for each group of heads; none in a ring, without anything to hide, or with padding after a token."""
    shape = {"length": 16, "heads": 6, "kv_heads": 3, "rows": 3, "exchange": "all_gather", "window": 5}
    check(
        pool, ranks,
        {**shape, "message": 1, "documents": True, "unmasked": True, "calls": 3},
        {**shape, "exchange": "ring", "calls": 0},
        {**shape, "window": None, "calls": 0},
        {**shape, "padding": "right", "calls": 0},
        {**shape, "padding": "right", "exchange": "auto", "small": 0, "calls": 0},
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 5], ids=["blocks", "a kernel"])
def test_keys_of_the_next_heads_travel_while_heads_are_computed(pool: RankPool, window: int | None) -> None:
    """And gradients of the previous heads' keys: each is waited for when the heads after it have been computed."""
    case = {"length": 16, "heads": 6, "kv_heads": 3, "exchange": "all_gather", "message": 1, "window": window}
    found = pool.run(jobs_context.order_of_events, case | ({} if window is None else {"calls": 3}), ranks=2)
    kernel = "" if window is None else "_of_runs"
    expected = f"""
        start all-gather 0, start all-gather 1, wait all-gather 0, forward{kernel},
        start all-gather 2, wait all-gather 1, forward{kernel}, wait all-gather 2, forward{kernel},
        start all-gather 3, start all-gather 4, wait all-gather 3, backward{kernel}, start reduce-scatter 0,
        start all-gather 5, wait all-gather 4, backward{kernel}, start reduce-scatter 1, wait reduce-scatter 0,
        wait all-gather 5, backward{kernel}, start reduce-scatter 2, wait reduce-scatter 1, wait reduce-scatter 2
    """
    assert found == [[event.strip() for event in expected.split(",")]] * 2


def test_many_short_documents_go_by_blocks() -> None:
    seen = Visibility(None, torch.arange(600)[None] // 2)
    assert seen.pieces(Span(0, 600)) == [Span(0, 600)]
    longer = Visibility(None, torch.arange(600)[None] // 200)
    assert longer.pieces(Span(100, 500)) == [Span(100, 100), Span(200, 200), Span(400, 200)]
    assert Visibility(5, torch.arange(600)[None] // 200).pieces(Span(100, 500)) == [Span(100, 500)]
    assert Visibility().pieces(Span(0, 5000)) == [Span(0, 5000)]
    assert len(Visibility(5).pieces(Span(0, 5000))) == 5


@pytest.mark.more
def test_heads_that_do_not_divide(pool: RankPool) -> None:
    check(pool, 4, {"length": 16, "heads": 6, "kv_heads": 1, "exchange": "auto"})
    with pytest.raises(RankError) as caught:
        check(pool, 4, {"length": 16, "heads": 8, "kv_heads": 2, "exchange": "all_to_all"})
    assert set(caught.value.messages) == {0, 1, 2, 3}
    assert all("use 'ring' or 'all_gather'" in text for text in caught.value.messages.values())


@pytest.mark.parametrize("seen", [Seen.ALL, Seen.CAUSAL, "mask"])
def test_block_without_a_fused_kernel(seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where no kernel takes the block, against the CPU's."""
    draw = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 2, 4, 6, 8, generator=draw, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 6, 8, generator=draw, dtype=torch.float64)
    if seen == "mask":
        seen = torch.rand(2, 1, 6, 6, generator=draw) < 0.5
        seen[..., 0] = True
    out, lse = block_forward(q, k, v, seen)
    expected = (out, lse, *block_backward(grad, q, k, v, out, lse, seen))

    monkeypatch.setattr("lightning_moefold.modules.attention.blockwise._ON_CPU", "nowhere")
    found = (*block_forward(q, k, v, seen), *block_backward(grad, q, k, v, out, lse, seen))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_work_is_even_under_zig_zag() -> None:
    layout = ContextLayout(64, Axis("cp", (0, 1, 2, 3)))
    seen = Visibility()
    work = []
    for rank in range(4):
        pairs = 0
        for q in layout.spans(rank):
            for source in range(4):
                for k in layout.spans(source):
                    kind = seen.of(q, k, CPU)
                    pairs += {Seen.ALL: q.length * k.length, Seen.CAUSAL: q.length * (q.length + 1) // 2}.get(kind, 0)
        work.append(pairs)
    assert len(set(work)) == 1
    assert sum(work) == 64 * 65 // 2


def test_blocks_that_nobody_sees_are_skipped() -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    seen = Visibility(None, documents)
    assert seen.of(Span(4, 4), Span(0, 4), CPU) is Seen.NOTHING
    assert seen.of(Span(4, 4), Span(4, 4), CPU) is Seen.CAUSAL
    assert Visibility(3).of(Span(8, 4), Span(0, 4), CPU) is Seen.NOTHING
    assert Visibility().of(Span(8, 4), Span(0, 4), CPU) is Seen.ALL


@pytest.mark.parametrize(
    ("heads", "kv_heads", "cp", "length", "expected"),
    [(8, 8, 4, 8, "all_to_all"), (8, 2, 4, 8, "all_gather"), (32, 8, 4, 1 << 14, "ring")],
)
def test_choice(heads: int, kv_heads: int, cp: int, length: int, expected: str) -> None:
    layout = ContextLayout(length * cp, Axis("cp", tuple(range(cp))))
    q, k = (torch.empty(1, n, length, 128, device="meta") for n in (heads, kv_heads))
    assert choose_exchange(layout, q, k) == expected
