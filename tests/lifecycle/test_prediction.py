# SPDX-License-Identifier: Apache-2.0
"""Prediction with unequal numbers of batches: every row once, with the logits of one process, and nobody hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.testing import RankError, RankPool, hf_reference, make_checkpoint, relative_error
from tests.lifecycle import jobs_prediction
from tests.quick import quick
from tests.strategy import finetune

TP2 = "tp2 | ep4"  # of 8 ranks: four data ranks, two copies of each expert
SHARDINGS = ("optimizer", "full", "none")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8))


@pytest.fixture(scope="module")
def expected(path: str) -> Tensor:
    with torch.no_grad():
        return hf_reference(path)(input_ids=finetune.rows(11, 3), use_cache=False).logits


def check(outcomes: list[dict[str, Any]], fold: str, counts: list[int], expected: Tensor) -> None:
    """Each row comes on one data rank, the same on its tp ranks, with the logits of Hugging Face's code."""
    places = [Fold.parse(fold, len(outcomes)).coordinates(rank)["dp"] for rank in range(len(outcomes))]
    found: dict[tuple[int, int], Tensor] = {}
    owner: dict[tuple[int, int], int] = {}
    for place, seen in zip(places, outcomes, strict=True):
        assert (seen["loads"], seen["callbacks"], seen["open"], seen["strict"]) == (0, True, False, True)
        assert (seen["sharded"], seen["training"], seen["grad"]) == (True, True, True)
        assert len(seen["seen"]) == len(seen["rows"])  # no step has run on dummy rows
        for key, logits in seen["rows"].items():
            assert owner.setdefault(key, place) == place, key
            assert torch.equal(found.setdefault(key, logits), logits), key
    for (_, row), logits in found.items():
        assert relative_error(logits, expected[row]) < 1e-9, row
    assert sorted(found) == [(i, row) for i, count in enumerate(counts) for row in range(count)]


@pytest.mark.parametrize("sharding", quick(SHARDINGS, "full"))
@pytest.mark.more
def test_rows_of_unequal_batches(pool: RankPool, path: str, expected: Tensor, sharding: str) -> None:
    """Seven rows in batches of two on four data ranks, and a single row, with more micro-batches than rows."""
    options = {"data_parallel_sharding": sharding, "num_microbatches": 2}
    runs = [
        (TP2, {"rows": [7], "writes": True}, {}, options),
        (TP2, {"rows": [1]}, {}, options),
        (TP2, {"rows": [0]}, {}, options),
    ]
    outcomes = pool.run(jobs_prediction.cases, path, runs, ranks=8)
    for i, run in enumerate(runs):
        check([seen[i] for seen in outcomes], run[0], run[1]["rows"], expected)
    for seen in outcomes:
        assert seen[0]["hooks"] == ["14", "end"]
        assert seen[1]["hooks"] == (["end"] if seen[1]["seen"] else [])


RUNS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("| ep4", {"rows": [7]}, {}, {}),
    ("| ep4", {"rows": [9, 1, 6], "late": True}, {}, {}),
    ("| ep2", {"rows": [9, 3], "stream": True, "late": True}, {}, {"data_parallel_sharding": "full"}),
    ("tp2 | etp2 ep2", {"rows": [11], "teacher": True}, {}, {"data_parallel_sharding": "full"}),
    ("| ep4", {"rows": [11, 3], "teacher": True}, {}, {}),
    ("cp2 | ep4", {"rows": [7], "late": True}, {}, {}),
    ("pp2 | ep2", {"rows": [7, 1]}, {}, {"num_microbatches": 2}),
    ("tp2 | ep4", {"rows": [11], "iterator": True, "teacher": True}, {}, {}),
    ("tp2 | ep4", {"rows": [7], "generates": True}, {}, {"data_parallel_sharding": "full"}),
    ("| ep2", {"rows": [11], "generates": True}, {}, {}),
    ("| ep4", {"rows": [7]}, {}, {"capacity_factor": 50.0, "pad_to_capacity": True}),
]


@pytest.mark.more
def test_loaders_streams_and_several_models(pool: RankPool, path: str, expected: Tensor) -> None:
    outcomes = pool.run(jobs_prediction.cases, path, RUNS, ranks=4)
    for i, (fold, spec, _, _) in enumerate(RUNS):
        check([seen[i] for seen in outcomes], fold, spec["rows"], expected)
    texts = hf_reference(path).generate(
        input_ids=finetune.rows(11, 3), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for i, (_, spec, _, _) in enumerate(RUNS):
        found = {row: text for seen in outcomes for row, text in seen[i]["texts"].items()}
        assert sorted(found) == (list(range(spec["rows"][0])) if spec.get("generates") else [])
        assert all(torch.equal(text, texts[row, : len(text)]) for row, text in found.items())


@pytest.mark.more
def test_limits(pool: RankPool, path: str) -> None:
    """Data ranks 0 to 2 have two batches, and rank 3 one."""
    runs = [("| ep4", {"rows": [11]}, {"limit_predict_batches": limit}, {}) for limit in (0, 1, 5)]
    outcomes = pool.run(jobs_prediction.cases, path, runs, ranks=4)
    for limit, rows in ((0, 0), (1, 8), (2, 11)):
        assert sum(len(seen[limit]["rows"]) for seen in outcomes) == rows


@pytest.mark.more
def test_a_rank_that_fails(pool: RankPool, path: str) -> None:
    """Row 5 is on data rank 1, in its first batch; data rank 3 is a batch short and waits for the others."""
    messages = pool.run(jobs_prediction.failing, path, "| ep4", {"rows": [15], "fails": 5}, ranks=4)
    assert messages[1] == "OSError: the disk is full"
    for rank in (0, 2, 3):
        assert messages[rank] == "PeerError: another rank has failed; its own error says why."
    messages = pool.run(jobs_prediction.failing, path, TP2, {"rows": [3], "fails": 2}, ranks=8)
    assert messages[4] == messages[5] == "OSError: the disk is full"  # data rank 2; data rank 3 has no row at all
    assert all(messages[rank].startswith("PeerError") for rank in (0, 1, 2, 3, 6, 7))
    messages = pool.run(jobs_prediction.failing, path, "| ep4", {"rows": [7], "bad": True}, ranks=4)
    assert all("1 token ids in the batch lie outside the vocabulary" in message for message in messages)


@pytest.mark.slow
def test_a_rank_that_fails_in_the_middle_of_a_call(pool: RankPool, path: str) -> None:
    """It raises at once: its peers are inside the call and cannot be told."""
    with pytest.raises(RankError) as caught:
        pool.run(jobs_prediction.failing_inside, path, "| ep4", ranks=4)
    assert caught.value.messages[1] == "the kernel is gone"


def test_fewer_rows_than_ranks_without_a_model(pool: RankPool) -> None:
    assert pool.run(jobs_prediction.plain, "tp2", ranks=4) == [[[0]], [[0]], None, None]


@pytest.mark.parametrize("fold", quick(["tp2 | ep4", "| ep2"], "tp2 | ep4"))
@pytest.mark.more
def test_calls_outside_a_trainer(pool: RankPool, path: str, fold: str) -> None:
    for rank, seen in enumerate(pool.run(jobs_prediction.by_hand, path, fold, ranks=4)):
        assert seen["same"] == [True] * (rank // 2)
        assert seen["loads"] == 0
        assert "under torch.no_grad()" in seen["gradients"] or "PeerError" in seen["gradients"]
        assert seen["again"] == "no error"
