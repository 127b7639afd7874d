# SPDX-License-Identifier: Apache-2.0
"""Muon: torch's on one matrix to the bit, and on models under folds what one process computes with whole matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_moefold import Fold
from lightning_moefold.optim import Muon
from lightning_moefold.optim.matrices import MatrixCut
from lightning_moefold.testing import RankPool
from tests.exactness import compare, matrix
from tests.exactness.optimizers import muon
from tests.optim import jobs_muon
from tests.quick import quick


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_bits_of_torch(shape: tuple[int, int], nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first = Muon([("proj.weight", ours)], lr=0.02, nesterov=nesterov)
    second = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov)
    for _ in range(3):
        grad = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        first.step()
        second.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_state_of_another_precision_goes_on(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A checkpoint keeps the dtypes of the run that wrote it."""
    weight = nn.Parameter(torch.full((6,), 0.01, dtype=dtypes[0]))
    optimizer = Muon([("norm.weight", weight)], lr=1.0)
    for dtype in dtypes:
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        state = optimizer.state[weight]
        state |= {key: state[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    assert bool((weight < 0.0095).all())


#: Data ranks that cut matrices, and experts of one rank; tp and etp beside them; heads that tp does not divide; stages.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tp2 | ep2 etp2", {"shape": "12 experts", "family": "qwen2_moe"}),
    ("tp2 | etp2", {"shape": "28 heads", "sharding": "full", "family": "qwen3_moe"}),
    ("", {"shape": "6 experts, tied", "sharding": "full", "frozen": "router", "family": "mixtral"}),
    ("tp4 | ep2", {"shape": "6 experts, tied", "family": "mixtral", "sharding": "none"}),
    (
        "pp2 | ep2",
        {"shape": "dense layers", "family": "qwen2_moe", "microbatches": 2, "schedule": "1f1b", "moves": True},
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("muon")


@pytest.mark.parametrize(
    ("fold", "factors"), quick(CASES, CASES[0], CASES[1]), ids=[fold or "dp4" for fold, _ in CASES]
)
def test_folds(pool: RankPool, folder: Path, fold: str, factors: dict[str, Any]) -> None:
    compare.check(pool, folder, Fold.parse(fold, 4), {**matrix.PLAIN, **factors, "optimizer": muon})


@pytest.mark.parametrize("most", [None, 60, 1])
def test_bits_of_one_process_whoever_computes(pool: RankPool, most: int | None) -> None:
    """All matrices at once, a few, or one at a time."""
    expected = jobs_muon.train(None, spread=False)
    for found in pool.run(jobs_muon.train, most, ranks=4):
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_schedule_scales_both() -> None:
    weight, norm = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((3, 4), (4,)))
    optimizer = Muon([("a.weight", weight), ("norm.weight", norm)], lr=0.02, adamw_lr=0.01, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    weight.grad, norm.grad = torch.ones_like(weight), torch.ones_like(norm)
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(norm.detach(), torch.full_like(norm, 1 - 0.005))
    assert optimizer.param_groups[0].keys().isdisjoint({"param_names"})


def test_pieces_of_a_matrix() -> None:
    """Seven rows over three ranks are three, three and one, as fully_shard cuts them."""
    rows, columns = MatrixCut(None, 3, 0, 0, 7), MatrixCut(None, 2, 1, 1, 8)
    assert [rows.piece(rank) for rank in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [columns.piece(rank) for rank in range(2)] == [slice(0, 4), slice(4, 8)]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"lr": -1}, "lr=-1"), ({"lr": 0}, "lr=0"), ({"momentum": 1.0}, "momentum=1.0"), ({"ns_steps": 0}, "ns_steps=0")],
)
def test_values_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Muon([nn.Parameter(torch.ones(2, 2))], **options)


def test_a_matrix_without_a_name() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="give it module.named_parameters"):
        Muon([weight]).step()
