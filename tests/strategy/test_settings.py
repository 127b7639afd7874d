# SPDX-License-Identifier: Apache-2.0
"""A second Trainer with other settings on the same module: each is applied as to a fresh module, or refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_settings

CAPACITY = {"fold": "| ep2", "capacity_factor": 0.5}
PIPELINE = {"pipeline_parallel_size": 2, "num_microbatches": 4, "pipeline_schedule": "gpipe"}
LOOPED = {**PIPELINE, "pipeline_schedule": "interleaved_1f1b", "num_stages_per_rank": 2}

#: Ranks, settings of the first and of the second Trainer.
APPLIED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "capacity_factor": (1, {"capacity_factor": 0.25}, {}),
    "drop_policy drop_scope pad_to_capacity dispatch_chunks": (
        2, CAPACITY,
        {**CAPACITY, "drop_policy": "position", "drop_scope": "sub_sequence", "pad_to_capacity": True, "dispatch_chunks": 2},
    ),
    "dispatcher node_size": (2, {"fold": "| ep2"}, {"fold": "| ep2", "dispatcher": "hierarchical", "node_size": 1}),
    "expert_copies": (2, {"fold": "| ep2", "expert_copies": ExpertCopies("greedy")}, {"fold": "| ep2"}),
    "expert_kernel recompute num_microbatches": (
        1, {"num_microbatches": 4, "recompute": "full"}, {"num_microbatches": 2, "expert_kernel": "grouped_mm"},
    ),
    "compile calculate_per_token_loss": (
        1, {"accumulate_grad_batches": 2, "compile": True}, {"accumulate_grad_batches": 2, "calculate_per_token_loss": True},
    ),
    "offload_activations": (1, {}, {"offload_activations": True}),
    "context_parallel_exchange timeout": (
        2, {"fold": "cp2", "timeout": jobs_settings.LONG},
        {"fold": "cp2", "timeout": jobs_settings.SHORT, "context_parallel_exchange": "all_gather"},
    ),
    "num_microbatches pipeline_schedule": (2, PIPELINE, {**PIPELINE, "num_microbatches": 2, "pipeline_schedule": "1f1b"}),
    "pipeline_schedule": (2, LOOPED, {**LOOPED, "pipeline_schedule": "interleaved_zero_bubble"}),
}  # fmt: skip
#: Ranks, settings of the first Trainer, and those of others that are refused by their names.
REFUSED: list[tuple[int, dict[str, Any], dict[str, dict[str, Any]]]] = [
    (2, {}, {
        "fold": {"fold": "| ep2"}, "tensor_parallel_size": {"tensor_parallel_size": 2},
        "context_parallel_size": {"context_parallel_size": 2}, "pipeline_parallel_size": PIPELINE,
        "expert_parallel_size": {"expert_parallel_size": 2}, "expert_tensor_parallel_size": {"expert_tensor_parallel_size": 2},
        "data_parallel_sharding": {"data_parallel_sharding": "full"}, "process_group_backend": {"process_group_backend": "mpi"},
    }),
    (1, {"precision": "bf16-mixed"}, {"precision": {}}),
    (2, PIPELINE, {"num_stages_per_rank": LOOPED, "pipeline_split": {**PIPELINE, "pipeline_split": [1, 3]}}),
    (2, LOOPED, {"pipeline_schedule": {**PIPELINE, "pipeline_schedule": "zbv"}}),
]  # fmt: skip
#: Of which a module knows nothing: ``auto`` says what ``fold="auto"`` is to plan for, ``sequence_parallel`` takes one value, and
#: the others are for checkpoints.
OTHERS = {"auto", "sequence_parallel", "checksums", "async_save"}
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
    folder, sizes = tmp_path_factory.mktemp("model") / "qwen", {"moe_intermediate_size": 8, "num_hidden_layers": 4}
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, **sizes))


def test_every_argument_is_changed() -> None:
    changed = {name for names in APPLIED for name in names.split()} | {name for *_, said in REFUSED for name in said}
    assert set(inspect.signature(MoEFoldStrategy).parameters) <= changed | OTHERS


@pytest.mark.parametrize("names", quick(APPLIED, *list(APPLIED)[:3]))
def test_applied(pool: RankPool, path: str, names: str) -> None:
    ranks, first, second = APPLIED[names]
    for before, changed, fresh in pool.run(jobs_settings.change, path, first, second, ranks=ranks):
        assert before != changed["told"][1]
        assert changed["told"] == fresh["told"]
        assert changed["losses"] == fresh["losses"]
        assert changed["weights"].keys() == fresh["weights"].keys()
        assert all(torch.equal(changed["weights"][k], w) for k, w in fresh["weights"].items())


@pytest.mark.parametrize(("ranks", "first", "others"), REFUSED, ids=[" ".join(others) for *_, others in REFUSED])
def test_refused(pool: RankPool, path: str, ranks: int, first: dict[str, Any], others: dict[str, Any]) -> None:
    for said in pool.run(jobs_settings.refusals, path, first, others, ranks=ranks):
        for name, message in said.items():
            assert message.startswith("InputError: "), f"{name}: {message}"
            assert ("fold" if name.endswith("_size") else name) in message


@pytest.mark.more
def test_auto_goes_on_with_what_the_model_has(pool: RankPool, path: str) -> None:
    """Under its fold, with the settings of the first Trainer where none are given, and with those given."""
    for _, changed, _ in pool.run(jobs_settings.change, path, PIPELINE, {"fold": "auto", "recompute": "full"}, ranks=2):
        [validated, _] = changed["told"]
        assert (validated["microbatches"], validated["pipeline"][0]) == (4, "gpipe")
        assert {value[0] for name, value in validated.items() if name.count(".") == 2} == {"full"}
