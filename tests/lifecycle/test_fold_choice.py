# SPDX-License-Identifier: Apache-2.0
"""``fold="auto"``: chosen for the model, the batch and the machine, the same on every rank, and exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from lightning_moefold import AutoFold, MoEFoldStrategy
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.lifecycle.fold_choice import Fixed, agreed
from lightning_moefold.lifecycle.fold_choice import machine as machine_at_hand
from lightning_moefold.parallel import Settings
from lightning_moefold.planner import PRESETS
from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.lifecycle import jobs_fold_choice


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8))


def machine(folder: Path, name: str, **changes: str) -> str:
    """A file for the planner in which one thing is made cheap or dear."""
    text = PRESETS["cpu"].to_toml()
    for field, value in changes.items():
        head, _, rest = text.partition(f"\n{field} = ")
        assert rest, field
        text = f"{head}\n{field} = {value}\n{rest.partition(chr(10))[2]}"
    (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{name}.toml")


def check(pool: RankPool, path: str, seen: list[dict[str, Any]], steps: int, first: int = 0) -> None:
    """All ranks alike, said why, and losses and weights of one process."""
    [expected] = pool.run(jobs_fold_choice.reference, path, seen[0]["microbatches"], steps, ranks=1)
    assert len({tuple(s[key] for key in ("fold", "microbatches", "recompute", "schedule")) for s in seen}) == 1
    assert seen[0]["losses"] == pytest.approx(expected["losses"][first:], rel=1e-9)
    assert_close_by_name(assemble(s["weights"] for s in seen), assemble([expected["weights"]]), 1e-8, "weights")
    assert seen[0]["fold"] in seen[0]["said"][0]
    assert "bound by" in seen[0]["said"][0]


def test_exact_and_the_same_on_every_rank(pool: RankPool, path: str, tmp_path: Path) -> None:
    """On a slow network a pipeline; the run is resumed where messages cost nothing, under the fold that is best there."""
    slow = machine(tmp_path, "slow", bandwidth_gb_s="0.0001")
    first = pool.run(
        jobs_fold_choice.fit, path, {**jobs_fold_choice.BATCH, "hardware": slow}, {}, False, str(tmp_path), ranks=2
    )
    assert "pp1" not in first[0]["fold"]
    check(pool, path, first, 3)
    fast = machine(tmp_path, "fast", bandwidth_gb_s="1000000", latency_us="0", collective="0")
    options = {"num_microbatches": first[0]["microbatches"]}
    checkpoint = str(tmp_path / "auto.ckpt")
    then = pool.run(
        jobs_fold_choice.fit,
        path,
        {**jobs_fold_choice.BATCH, "hardware": fast},
        options,
        False,
        None,
        checkpoint,
        5,
        ranks=2,
    )
    assert then[0]["fold"] != first[0]["fold"]
    check(pool, path, then, 5, first=3)
    [remark] = [line for line in then[0]["said"] if "saved under" in line]
    assert first[0]["fold"] in remark
    assert then[0]["fold"] in remark
    assert "which changes no result." in remark


@pytest.mark.more
def test_a_model_made_in_init(pool: RankPool, path: str) -> None:
    """Is known before the data is set up; a dispatcher that was given stays."""
    seen = pool.run(jobs_fold_choice.fit, path, jobs_fold_choice.BATCH, {"dispatcher": "hierarchical"}, True, ranks=2)
    check(pool, path, seen, 3)
    assert {s["dispatcher"] for s in seen} == {"hierarchical"}


@pytest.mark.parametrize("name", ["alltoall", "deduplicated", "hierarchical", "allgather"])
def test_a_given_dispatcher_is_planned_as_itself(name: str) -> None:
    """And \"auto\" leaves it to the planner."""
    for given, expected in ((name, (name,)), ("auto", ("alltoall", name))):
        fixed = Fixed(8, 8, "bf16-mixed", Settings(dispatch=DispatchConfig(given)), None)  # type: ignore[arg-type]
        assert fixed.space(("alltoall", name)).dispatchers == expected


def test_activations_are_offloaded_as_the_strategy_does() -> None:
    """And not otherwise: the strategy cannot offload an optimizer's state."""
    fixed = Fixed(8, 8, "bf16-mixed", Settings(offload=True), None)
    assert fixed.space(("alltoall",), offloads=True).offloads == ("activations",)
    assert fixed.space(("alltoall",)).offloads == ("none",)


def test_schedules_that_cannot_run_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Fixed(8, 8, "32-true", Settings(), None)
    assert {"zbv", "dualpipev", "interleaved_zero_bubble"} < set(fixed.space(("alltoall",)).schedules)
    for settings in (Settings(compiler="inductor"), Settings(expert_kernel="transformer_engine")):  # which refuse them
        assert set(Fixed(8, 8, "32-true", settings, None).space(("alltoall",)).schedules) == {
            "1f1b",
            "interleaved_1f1b",
        }
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    assert set(fixed.space(("alltoall",)).schedules) == {"1f1b", "interleaved_1f1b"}


def test_a_node_is_what_shares_fast_links() -> None:
    """``node_size``, where it was given; the memory is that of the machine's ranks."""
    of_four, of_two = (machine_at_hand(AutoFold(), 4, torch.device("cpu"), size) for size in (None, 2))
    assert (of_four.gpus_per_node, of_two.gpus_per_node) == (4, 2)
    assert of_four.memory_bytes == of_two.memory_bytes
    assert machine_at_hand(AutoFold(hardware="dgx-h100"), 4, torch.device("cpu"), 2).gpus_per_node == 2


def test_a_dataloader_says_rows_and_length(pool: RankPool, path: str) -> None:
    for seen in pool.run(jobs_fold_choice.loader, path, ranks=2):
        assert seen["fold"] == seen["record"]["fold"]
        assert len(seen["losses"]) == 2


@pytest.mark.parametrize(("batch", "kind", "sentence"), [
    ({}, "", "cannot see global_batch_size and sequence_length before the data is loaded"),
    pytest.param({"global_batch_size": 8}, "", "AutoFold(sequence_length=...)", marks=pytest.mark.more),
    pytest.param(jobs_fold_choice.BATCH, "own", "in a custom network", marks=pytest.mark.more),
    pytest.param(jobs_fold_choice.BATCH, "none", "holds none after configure_model", marks=pytest.mark.more),
    (jobs_fold_choice.BATCH, "early", "make the model in __init__"),
    ({**jobs_fold_choice.BATCH, "hardware": "abacus"}, "", "hardware 'abacus' is not known"),
])  # fmt: skip
def test_refusals_on_every_rank(pool: RankPool, path: str, batch: dict[str, Any], kind: str, sentence: str) -> None:
    for message in pool.run(jobs_fold_choice.refusals, path, batch, kind, ranks=2):
        assert sentence in message


def test_arguments_that_contradict() -> None:
    with pytest.raises(ValueError, match="leave one out"):
        MoEFoldStrategy(auto=AutoFold())
    with pytest.raises(ValueError, match="use one or the other"):
        MoEFoldStrategy(2, fold="auto")
    with pytest.raises(ValueError, match="pipeline of known size"):
        MoEFoldStrategy(fold="auto", pipeline_split=[1, 1])
    with pytest.raises(ValueError, match="not both"):
        AutoFold(global_batch_size=8, batch_size=2)


def test_one_rank_plans_and_all_hear_of_it() -> None:
    told: list[Any] = []
    assert agreed(lambda: 3, lambda said: told.append(said) or said, rank=0) == 3
    assert agreed(lambda: pytest.fail("rank 1 planned"), lambda _: told[0], rank=1) == 3

    def refuse() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        agreed(refuse, lambda said: told.append(said) or said, rank=0)
    with pytest.raises(ValueError, match="no"):
        agreed(lambda: None, lambda _: told[1], rank=1)
