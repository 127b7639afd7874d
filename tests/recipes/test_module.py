# SPDX-License-Identifier: Apache-2.0
"""The shipped module and data: exact losses, and runs that are resumed in the middle of an epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lightning_moefold import MoECausalLM
from lightning_moefold.recipes import FineTuneModule, InputError, TextData
from lightning_moefold.recipes.optimizer import parameter_groups, warmup_and_decay
from lightning_moefold.recipes.packing import PADDING
from lightning_moefold.testing import RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.quick import quick
from tests.recipes import jobs_module

# ---- measuring ---------------------------------------------------------------------------------------------------


def reference(folder: Path, packing: str) -> dict[int, tuple[float, int]]:
    """Loss and label tokens of each document, one row (or one document of it) at a time in Hugging Face's code."""
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    data = TextData(
        [str(folder / "b.jsonl")], str(folder / "checkpoint"), 64, 4, packing, [str(folder / "c.jsonl")],
        cache_dir=str(folder / "tokens"),
    )  # fmt: skip
    data.prepare_data()
    data.setup("validate")
    part = data.part("val")
    sums: dict[int, tuple[float, int]] = {}
    for token_L, document_L, _ in zip(*part.take(torch.arange(len(part))), strict=True):
        alone = [document_L == d for d in document_L.unique() if d != PADDING]
        for place_L in alone if packing == "documents" else [torch.ones_like(document_L, dtype=torch.bool)]:
            with torch.no_grad():
                logits_SV = model(token_L[place_L].unsqueeze(0)).logits[0, :-1].double()
            losses = F.cross_entropy(logits_SV, token_L[place_L][1:], reduction="none")
            for loss, document in zip(losses.tolist(), document_L[place_L][1:].tolist(), strict=True):
                total, count = sums.get(document, (0.0, 0))
                sums[document] = (total + loss, count + 1)
    return sums


@pytest.mark.parametrize("packing", quick(["blocks", "documents"], "documents"))
@pytest.mark.more
def test_losses_of_a_whole_data_set_and_of_its_documents(pool: RankPool, folder: Path, tmp_path: Path, packing: str):
    expected = reference(folder, packing)
    mean = sum(loss for loss, _ in expected.values()) / sum(count for _, count in expected.values())
    for ranks, fold in ((1, ""), (2, "| ep2"), (4, "tp2 | ep4")):
        file = tmp_path / f"{ranks}.jsonl"
        seen = pool.run(jobs_module.measure, str(folder), fold, packing, str(file), None, ranks=ranks)
        for metrics in seen:
            assert metrics == seen[0]
            assert metrics["val/loss"] == metrics["test/loss"] == pytest.approx(mean, rel=2e-6)
            assert metrics["val/perplexity"] == pytest.approx(math.exp(mean), rel=2e-5)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["document"] for line in lines] == sorted(expected)
        for line in lines:
            loss, count = expected[line["document"]]
            assert line["tokens"] == count
            assert line["loss"] == pytest.approx(loss / count, rel=1e-5)
            assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
            assert line["source"] == f"c.jsonl:{line['document'] + 1}"


@pytest.mark.more
def test_batches_weigh_as_many_tokens_as_they_have(pool: RankPool, folder: Path, tmp_path: Path):
    """The mean of batch losses is another number on this text: the tests above would not pass with it."""
    [whole] = pool.run(jobs_module.measure, str(folder), "", "documents", str(tmp_path / "a"), None, ranks=1)
    [first] = pool.run(jobs_module.measure, str(folder), "", "documents", str(tmp_path / "a"), 1, ranks=1)
    assert abs(whole["val/loss"] - first["val/loss"]) > 1e-3


# ---- resuming ----------------------------------------------------------------------------------------------------


def rows_of(reports: list[jobs_module.Report]) -> dict[int, list[tuple[int, ...]]]:
    """Rows that the data ranks were given together, sorted, for each epoch."""
    given: dict[int, list[tuple[int, ...]]] = {}
    for report in {r.dp_rank: r for r in reports}.values():
        for epoch, rows in report.rows.items():
            given.setdefault(epoch, []).extend(map(tuple, rows))
    return {epoch: sorted(rows) for epoch, rows in given.items()}


@pytest.mark.more
def test_a_run_under_one_two_and_one_data_ranks_is_the_uninterrupted_run(pool: RankPool, folder: Path, tmp_path: Path):
    arguments = {"max_epochs": 2, "check_val_every_n_epoch": 1}
    common: tuple[Any, ...] = ({}, {"packing": "documents"}, arguments)
    [whole] = pool.run(jobs_module.fit, str(folder), "", *common, str(tmp_path / "0"), microbatches=2, ranks=1)
    length = whole.steps[0]
    assert whole.steps == [length, 2 * length]
    assert len(rows_of([whole])[0]) % 4  # the last batch of an epoch is not full
    losses, done = whole.losses, 3
    checkpoint = str(tmp_path / "0" / f"step={done}.ckpt")
    for number, (ranks, fold, end) in enumerate([(2, "| ep2", 5), (4, "tp2 | ep4", 7), (1, "", length + 2)], start=1):
        save = str(tmp_path / str(number))
        reports = pool.run(jobs_module.fit, str(folder), fold, *common, save, checkpoint, number == 2, 2, ranks=ranks)
        assert len({r.dp_rank for r in reports}) == (1 if ranks == 1 else 2)
        for report in reports:
            assert report.losses == pytest.approx(losses[done:], rel=1e-9), fold
            assert report.validation == pytest.approx(whole.validation, rel=1e-6)
            assert report.steps == whole.steps
        assert_close_by_name(assemble(r.weights for r in reports), assemble([whole.weights]), 1e-8, fold)
        done, checkpoint = end, str(tmp_path / str(number) / f"step={end}.ckpt")
    reports = pool.run(jobs_module.fit, str(folder), "| ep2", *common, None, checkpoint, microbatches=2, ranks=2)
    assert reports[0].losses == pytest.approx(losses[length + 2 :], rel=1e-9)
    seen, rest = rows_of([whole])[1], rows_of(reports)
    assert set(rest) == {1}
    assert len(seen) - len(rest[1]) == 8
    assert set(rest[1]) < set(seen)


@pytest.mark.more
@pytest.mark.parametrize(
    "early", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "loaders made before the checkpoint is read"]
)
def test_other_batch_sizes_after_a_resume(pool: RankPool, folder: Path, tmp_path: Path, early: bool):
    """What is left of the epoch is read once, and later epochs are whole ones of another length."""
    arguments = {"max_epochs": 3, "limit_val_batches": 1}
    [whole] = pool.run(jobs_module.fit, str(folder), "", {}, {}, arguments, str(tmp_path / "0"), ranks=1)
    every = rows_of([whole])[0]
    length = whole.steps[0]
    for batch_size, step in ((8, 2), (2, length + 3)):
        epoch, taken = divmod(4 * step, 4 * length)
        reports = pool.run(
            jobs_module.fit, str(folder), "| ep2", {}, {"batch_size": batch_size}, arguments, None,
            str(tmp_path / "0" / f"step={step}.ckpt"), early, ranks=2,
        )  # fmt: skip
        given = rows_of(reports)
        assert set(given) == set(range(epoch, 3))
        begun = sorted(map(tuple, whole.rows[epoch][:taken]))
        assert sorted(begun + given[epoch]) == every
        batches = -(-(len(every) - taken) // batch_size)
        assert reports[0].steps[0] == step + batches
        for later in range(epoch + 1, 3):
            assert given[later] == every
            assert reports[0].steps[later - epoch] == step + batches + (later - epoch) * -(-len(every) // batch_size)
        assert len(reports[0].validation) == 3 - epoch


# ---- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_frozen_parameters_stay(pool: RankPool, folder: Path):
    patterns = ["*.mlp.gate.*", "*.experts.*"]
    source = dict(MoECausalLM.from_pretrained(folder / "checkpoint").named_parameters())
    reports = pool.run(
        jobs_module.fit,
        str(folder),
        "tp2 | ep2",
        {"freeze": patterns},
        {},
        {"max_steps": 2, "limit_val_batches": 0},
        ranks=2,
    )
    found = assemble(r.weights for r in reports)
    assert set(found) == set(source)
    for name, value in found.items():
        same = torch.equal(value.float(), source[name].detach())
        assert same == (".mlp.gate." in name or ".experts." in name), name


def test_random_weights_by_seed(folder: Path):
    def weights(seed: int | None) -> torch.Tensor:
        module = FineTuneModule(str(folder / "checkpoint"), initial_seed=seed)
        module.configure_model()
        return module.model.model.layers["0"].self_attn.q_proj.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(None), weights(1))


def test_wrong_arguments_end_on_all_ranks(pool: RankPool, folder: Path, tmp_path: Path):
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"val_files": ["none.txt"]}, "InputError: none.txt is no file"),
        ({}, {"batch_size": 3}, "InputError: batch_size=3 rows cannot be dealt evenly to 2 data ranks"),
        ({"freeze": ["*.expert.*"]}, {}, "InputError: freeze: no parameter is named like '*.expert.*'"),
    ]
    for messages in pool.run(jobs_module.errors, str(folder), [case[:2] for case in cases], ranks=2):
        for message, (*_, expected) in zip(messages, cases, strict=True):
            assert message.startswith(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1}, "learning_rate=-1 must be at least 0."),
        ({"learning_rate": math.nan}, "learning_rate=nan must be at least 0."),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number, at least 0."),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0."),
        ({"schedule": "step"}, "schedule='step' is not available; use 'cosine' or 'linear' or 'constant'."),
        ({"final_learning_rate": -0.1}, "final_learning_rate=-0.1 must be at least 0."),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0."),
        ({"betas": (0.9, 1.5)}, "betas[1]=1.5 must be at least 0 and below 1."),
        ({"betas": (0.9, 1.0)}, "betas[1]=1.0 must be at least 0 and below 1."),
        ({"betas": (0.9,)}, "betas=(0.9,) must be two numbers, such as (0.9, 0.95)."),
        ({"total_steps": 1.5}, "total_steps=1.5 must be a whole number, at least 1."),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        FineTuneModule("somewhere", **changes)
    assert str(caught.value) == message


def test_something_is_left_to_train(folder: Path) -> None:
    module = FineTuneModule(str(folder / "checkpoint"), freeze=["*.mlp.*", "*"])
    with pytest.raises(InputError, match=r"freeze=.* leaves no parameter to train"):
        module.configure_model()


def test_weight_decay_is_for_matrices(folder: Path):
    model = MoECausalLM.from_pretrained(folder / "checkpoint", output_router_logits=True)
    model.model.norm.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.5)
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.5 for p in group["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if "norm" not in name and "bias" not in name}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("offloads", [False, True])
def test_state_is_offloaded_if_asked_for(folder: Path, offloads: bool):
    module = FineTuneModule(str(folder / "checkpoint"), offload_state=offloads, schedule="constant")
    module.configure_model()
    assert ("_moefold_offloaded" in vars(module.configure_optimizers()["optimizer"])) == offloads


@pytest.mark.parametrize(("decay", "half"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_the_learning_rate_rises_and_falls(decay: Any, half: float):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    asked: list[int] = []

    def total() -> int:
        asked.append(1)
        return 20

    schedule = warmup_and_decay(optimizer, 4, total, decay)
    assert not asked  # the length of the run is known later than the schedule
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(half)
    assert rates[20] == pytest.approx(1.0 if decay == "constant" else 0.1)


def test_rows_longer_than_the_model_was_made_for(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    module = FineTuneModule(str(folder / "checkpoint"))
    module.configure_model()
    for length in (128, 129, 129):  # the model's max_position_embeddings is 128
        module.training_step({name: torch.zeros(1, length, dtype=torch.int64) for name in ("input_ids", "labels")}, 0)
    [warning] = [str(w.message) for w in recwarn if "max_position_embeddings" in str(w.message)]
    assert warning.startswith("rows have 129 tokens and the model's max_position_embeddings is 128: ")


# ---- accumulating ------------------------------------------------------------------------------------------------


@pytest.mark.more
def test_accumulated_batches_are_one_large_batch(pool: RankPool, folder: Path):
    """By default; the mean of batch losses is another number on this text."""
    found = {}
    for batch_size, per_token in ((8, True), (4, True), (4, False)):
        module = {"aux_loss": False} if per_token else {"aux_loss": False, "calculate_per_token_loss": False}
        data = {"packing": "documents", "batch_size": batch_size}
        arguments = {"max_epochs": 1, "accumulate_grad_batches": 8 // batch_size, "limit_val_batches": 0}
        reports = pool.run(
            jobs_module.fit, str(folder), "| ep2", module, data, {**arguments, "gradient_clip_val": 0.5}, ranks=2
        )
        found[batch_size, per_token] = assemble(report.weights for report in reports)
    assert_close_by_name(found[4, True], found[8, True], 1e-8, "weights")
    with pytest.raises(AssertionError):
        assert_close_by_name(found[4, False], found[8, True], 1e-5, "weights")


def test_other_strategies_are_told(folder: Path):
    module = FineTuneModule(str(folder / "checkpoint"))
    data = TextData([str(folder / "b.jsonl")], str(folder / "checkpoint"), 64, 4, cache_dir=str(folder / "tokens"))
    run = pl.Trainer(
        accelerator="cpu", accumulate_grad_batches=2, max_steps=1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(
        InputError, match="which SingleDeviceStrategy does not do; use MoEFoldStrategy, or set it to False"
    ):
        run.fit(module, data)
