# SPDX-License-Identifier: Apache-2.0
"""A second Trainer with other settings on the same module: each is applied as to a fresh module, or refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_settings

CAPACITY = {"capacity_factor": 0.5}
PIPELINE = {"pipeline_parallel_size": 2, "num_microbatches": 4, "pipeline_schedule": "gpipe"}
LOOPED = {**PIPELINE, "pipeline_schedule": "interleaved_1f1b", "num_stages_per_rank": 2}

#: The argument, ranks, settings of the first and of the second Trainer.
APPLIED: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("capacity_factor", 1, {"capacity_factor": 0.25}, {}),
    ("drop_policy", 1, CAPACITY, {**CAPACITY, "drop_policy": "position"}),
    ("drop_scope", 2, {**CAPACITY, "fold": "tp2"}, {**CAPACITY, "fold": "tp2", "drop_scope": "sub_sequence"}),
    ("pad_to_capacity", 2, {**CAPACITY, "fold": "| ep2"}, {**CAPACITY, "fold": "| ep2", "pad_to_capacity": True}),
    ("dispatch_chunks", 2, {"fold": "| ep2"}, {"fold": "| ep2", "dispatch_chunks": 2}),
    ("dispatcher", 2, {"fold": "| ep2"}, {"fold": "| ep2", "dispatcher": "allgather"}),
    ("node_size", 1, {"dispatcher": "hierarchical"}, {"dispatcher": "hierarchical", "node_size": 2}),
    ("expert_kernel", 1, {}, {"expert_kernel": "grouped_mm"}),
    ("recompute", 1, {"recompute": "full"}, {}),
    ("compile", 1, {"compile": True}, {}),
    ("num_microbatches", 1, {"num_microbatches": 4}, {"num_microbatches": 2}),
    ("num_microbatches", 2, PIPELINE, {**PIPELINE, "num_microbatches": 2}),
    ("context_parallel_exchange", 2, {"fold": "cp2"}, {"fold": "cp2", "context_parallel_exchange": "all_gather"}),
    ("calculate_per_token_loss", 1, {"accumulate_grad_batches": 2},
     {"accumulate_grad_batches": 2, "calculate_per_token_loss": True}),
    ("pipeline_schedule", 2, PIPELINE, {**PIPELINE, "pipeline_schedule": "1f1b"}),
    ("pipeline_schedule", 2, {**LOOPED, "recompute": None}, {**LOOPED, "pipeline_schedule": "interleaved_zero_bubble"}),
    ("timeout", 2, {"fold": "tp2", "timeout": jobs_settings.LONG}, {"fold": "tp2", "timeout": jobs_settings.SHORT}),
]  # fmt: skip
#: Likewise, with a part of the refusal.
REFUSED: list[tuple[str, int, dict[str, Any], dict[str, Any], str]] = [
    ("fold", 2, {"fold": "tp2"}, {"fold": "| ep2"}, "fold"),
    ("tensor_parallel_size", 2, {}, {"tensor_parallel_size": 2}, "fold"),
    ("context_parallel_size", 2, {}, {"context_parallel_size": 2}, "fold"),
    ("pipeline_parallel_size", 2, {}, PIPELINE, "fold"),
    ("expert_parallel_size", 2, {}, {"expert_parallel_size": 2}, "fold"),
    ("expert_tensor_parallel_size", 2, {}, {"expert_tensor_parallel_size": 2}, "fold"),
    ("data_parallel_sharding", 2, {}, {"data_parallel_sharding": "full"}, "data_parallel_sharding"),
    ("precision", 2, {"precision": "bf16-mixed"}, {}, "precision"),
    ("num_stages_per_rank", 2, PIPELINE, LOOPED, "num_stages_per_rank"),
    ("pipeline_schedule", 2, {**LOOPED}, {**PIPELINE, "pipeline_schedule": "zbv"}, "pipeline_schedule"),
    ("pipeline_split", 2, PIPELINE, {**PIPELINE, "pipeline_split": [1, 3]}, "pipeline_split"),
    ("process_group_backend", 1, {}, {"process_group_backend": "mpi"}, "process_group_backend"),
]  # fmt: skip
#: Of which a module knows nothing: ``auto`` says what ``fold="auto"`` is to plan for, the other takes one value.
OTHERS = {"auto", "sequence_parallel"}
#: What ``make test`` changes: one of each kind of refusal, and of each place to which settings go.
FIRST = {
    "capacity_factor",
    "dispatcher",
    "num_microbatches",
    "context_parallel_exchange",
    "fold",
    "precision",
    "pipeline_split",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(
        make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8, num_hidden_layers=4)
    )


def test_every_argument_is_changed() -> None:
    changed = {name for name, *_ in APPLIED} | {name for name, *_ in REFUSED} | OTHERS
    assert set(inspect.signature(MoEFoldStrategy).parameters) <= changed


@pytest.mark.parametrize(
    ("name", "ranks", "first", "second"),
    quick(APPLIED, *(case for case in APPLIED if case[0] in FIRST)),
    ids=[f"{n}-{r}" for n, r, *_ in APPLIED],
)
def test_applied(pool: RankPool, path: str, name: str, ranks: int, first: Any, second: Any) -> None:
    for found in pool.run(jobs_settings.change, path, first, second, ranks=ranks):
        assert not isinstance(found, str), found
        changed, fresh, unlike = found
        assert changed["told"] == fresh["told"]
        assert changed["losses"] == fresh["losses"]
        assert changed["weights"].keys() == fresh["weights"].keys()
        assert all(torch.equal(changed["weights"][k], w) for k, w in fresh["weights"].items())
        # The argument has an effect that would show.
        assert fresh["told"] != unlike["told"] or fresh["losses"] != unlike["losses"]


@pytest.mark.parametrize(
    ("name", "ranks", "first", "second", "says"),
    quick(REFUSED, *(case for case in REFUSED if case[0] in FIRST)),
    ids=[n for n, *_ in REFUSED],
)
def test_refused(pool: RankPool, path: str, name: str, ranks: int, first: Any, second: Any, says: str) -> None:
    for message in pool.run(jobs_settings.change, path, first, second, ranks=ranks):
        assert isinstance(message, str), f"{name} was accepted"
        assert message.startswith("InputError: ")
        assert says in message


def test_auto_goes_on_with_what_the_model_has(pool: RankPool, path: str) -> None:
    """Under its fold, with the settings of the first Trainer where none are given, and with those given."""
    for found in pool.run(jobs_settings.change, path, {**PIPELINE}, {"fold": "auto", "recompute": "full"}, ranks=2):
        assert not isinstance(found, str), found
        told = found[0]["told"][0]
        assert (told["microbatches"], told["pipeline"][0]) == (4, "gpipe")
        assert {value[0] for name, value in told.items() if name.count(".") == 2} == {"full"}
