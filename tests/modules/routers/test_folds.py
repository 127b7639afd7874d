# SPDX-License-Identifier: Apache-2.0
"""Every router, loss and bias computes under every fold what plain loops compute in one process (float64, below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.errors import ConfigError
from lightning_moefold.models.export import export
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.modules import RouterOptions
from lightning_moefold.recipes import FineTuneModule
from lightning_moefold.testing import RankPool, assert_close_by_name, make_batches, make_checkpoint, verify
from lightning_moefold.testing.pieces import assemble
from tests.exactness import cover
from tests.modules.routers import jobs_folds, naive
from tests.quick import quick

EXPERTS, ROWS, LENGTH = 8, 8, 5
#: Expert 1 is chosen by nobody at first, and others are chosen more often than their scores say.
BIAS = torch.tensor([0.02, -5.0, 0.0, 0.1, -0.05, 0.0, 0.07, 0.0])

ROUTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softmax after top-k": {"softmax_after_topk": True, "routed_scaling_factor": 1.7},
    "sigmoid": {"score_function": "sigmoid"},
    "groups": {"n_group": 4, "topk_group": 2, "group_score_topk": 1, "norm_topk_prob": True},
    "deepseek": {
        "score_function": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
        "bias_update_rate": 0.03,
    },
    "bias": {"bias_update_rate": 0.03},
    "fixed bias": {"bias_update_rate": 0.0},
    "noise": {"input_jitter": 0.2, "seed": 5, "bias_update_rate": 0.03},
    "forced": {"name": "force_balanced"},
    "own": {"name": "tempered", "norm_topk_prob": True},
    "swipe": {"name": "swipe", "score_function": "sigmoid", "bias_update_rate": 0.03, "input_jitter": 0.1},
    "topology": {"name": "topology_aware", "nodes": 2, "far_fraction": 0.2, "norm_topk_prob": True},
    "topology and bias": {
        "name": "topology_aware", "nodes": 2, "data_ranks": 4, "far_fraction": 0.3, "softmax_after_topk": True,
        "bias_update_rate": 0.03,
    },
}  # fmt: skip
FACTORS: dict[str, list[Any]] = {
    "router": list(ROUTERS),
    "aux_loss": ["off", "huggingface", "microbatch", "sequence", "global_batch"],
    "z": [0.0, 0.02],
    "padding": ["none", "right", "left"],
    "microbatches": [1, 2],
    "accumulate": [1, 2],
    "recompute": [None, "full"],
    "sharding": ["optimizer", "full", "none"],
    "look": [False, True],
}
TABLE = cover.pairwise(FACTORS, seed=2)


def _make(path: Path, layers: int) -> Path:
    """A checkpoint, and beside it one that is the same but for the experts' biases."""
    make_checkpoint(
        path, "qwen3_moe", num_experts=EXPERTS, hidden_size=16, moe_intermediate_size=8, num_experts_per_tok=3,
        norm_topk_prob=False, mlp_only_layers=[1], num_hidden_layers=layers,
    )  # fmt: skip
    biased = path.parent / "biased"
    biased.mkdir()
    tensors = load_file(path / "model.safetensors")
    for layer in set(range(layers)) - {1}:
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = BIAS.clone()
    save_file(tensors, biased / "model.safetensors", {"format": "pt"})
    (biased / "config.json").write_text((path / "config.json").read_text())
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("routers") / "model", layers=3)


@pytest.fixture(scope="module")
def deep_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With layers for the four stages that some schedules have on two ranks."""
    return _make(tmp_path_factory.mktemp("routers") / "model", layers=4)


def spec_of(row: dict[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = {"router_z_loss_coef": row["z"], "router_aux_loss_coef": 0.05}
    if ROUTERS[row["router"]]:
        overrides["router"] = ROUTERS[row["router"]]
    if row["aux_loss"] not in ("off", "huggingface"):
        overrides["aux_loss"] = row["aux_loss"]
    overrides["output_router_logits"] = row["aux_loss"] == "huggingface"
    names = ("accumulate", "recompute", "sharding", "look", "pipeline", "dispatch")
    spec = {name: row[name] for name in names if name in row} | {"num_microbatches": row["microbatches"]}
    return spec | {"overrides": overrides, "bias": BIAS if "bias_update_rate" in ROUTERS[row["router"]] else None}


def check(pool: RankPool, checkpoint: Path, fold: Fold, row: dict[str, Any]) -> None:
    spec = spec_of(row)
    path = str(checkpoint if spec["bias"] is None else checkpoint.parent / "biased")
    rows = max(ROWS // fold.dp, row["microbatches"]) | 1  # so that tp cuts through a row
    batches = make_batches(2 * row["accumulate"], fold.dp, rows, LENGTH, 96, seed=3, padding=row["padding"])
    if row["padding"] == "right" and rows > 1:  # a row that is all padding has no balance to lose
        batches[0][0]["attention_mask"][1] = 0
        batches[0][0]["labels"][1] = -100
    if row.get("empty"):  # a data rank with nothing but padding
        batches[0][-1]["attention_mask"][:] = 0
        batches[0][-1]["labels"][:] = -100
    if row.get("short"):  # a micro-batch that is empty on all ranks, and then one that is on the first
        batches[0] = [{name: tensor[:1] for name, tensor in batch.items()} for batch in batches[0]]
        batches[1][0] = {name: tensor[:1] for name, tensor in batches[1][0].items()}
    expected = naive.train_alone(str(checkpoint), batches, spec)
    actual = pool.run(jobs_folds.train, path, str(fold), batches, spec, ranks=fold.world_size, timeout=180)
    what = f"{fold}, {row}"
    for run in actual:
        assert run.losses == actual[0].losses, f"ranks disagree on the loss: {what}"
        for found, wanted in ((run.losses, expected.losses), (run.aux_losses, expected.aux)):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
        if row["z"]:
            torch.testing.assert_close(run.z_losses, expected.z, rtol=1e-9, atol=0, msg=lambda m: f"z, {what}: {m}")
        for layer, bias_E in run.bias.items():
            assert bias_E.dtype == torch.float64
            assert bias_E.tolist() == pytest.approx(expected.bias[layer], abs=1e-12), f"bias of layer {layer}, {what}"
            assert torch.equal(bias_E, next(other.bias[layer] for other in actual if layer in other.bias)), what
    dropped = sum(run.dropped for run in actual)
    assert dropped == expected.dropped, f"dropped choices, {what}"
    assert bool(dropped) == (bool(row.get("dispatch")) and row["router"] != "swipe"), f"dropped choices, {what}"
    for step, counts in enumerate(expected.counts):
        for layer in counts if ROUTERS[row["router"]].get("bias_update_rate") else ():
            chosen = sum(run.counts[step][layer] for run in actual if layer in run.counts[step])
            assert chosen.tolist() == counts[layer], f"choices in layer {layer}, {what}"
    for step, grads in enumerate(expected.grads):
        found = {**dict.fromkeys(grads), **assemble(run.grads[step] for run in actual)}
        assert_close_by_name(found, grads, 1e-9, f"gradients of step {step}, {what}")
    assert_close_by_name(assemble(run.weights for run in actual), expected.weights, 1e-9, f"weights, {what}")


def fit(fold: Fold, row: dict[str, Any]) -> dict[str, Any]:
    """A pipeline has enough micro-batches."""
    if fold.pp == 1:
        return row
    return {**row, "microbatches": max(2, row["microbatches"]), "pipeline": {"pipeline_schedule": "gpipe"}}


def _cases(folds: list[Fold], each: int, seed: int) -> list[Any]:
    rows = iter(cover.deal(TABLE, len(folds) * each, seed))
    return [pytest.param(fold, fit(fold, next(rows)), id=f"{fold}-{i}") for fold in folds for i in range(each)]


FOUR = [Fold.parse(text, 4) for text in ("tp2 cp2 | etp2 ep2", "cp2 | ep4", "tp2 pp2 | ep2", "pp2 cp2")]
PLAIN = {
    "router": "plain", "aux_loss": "sequence", "z": 0.02, "padding": "right", "microbatches": 1, "accumulate": 1,
    "recompute": None, "sharding": "optimizer", "look": False,
}  # fmt: skip


def _other(fold: str, ranks: int, router: str, schedule: str | None = None, mark: str = "slow", **other: Any) -> Any:
    """A case with token dropping (but for ``dispatch={}``) and a schedule, chosen by hand."""
    microbatches = {None: 1, "dualpipev": 4}.get(schedule, 2)
    row = {**PLAIN, "router": router, "dispatch": {"capacity_factor": 1.0}, "microbatches": microbatches, **other}
    row |= {"pipeline": {"pipeline_schedule": schedule}} if schedule else {}
    marks = getattr(pytest.mark, mark) if mark else ()
    name = f"{fold}-{router}-{schedule}-{row['dispatch'].get('dispatcher', 'alltoall' if row['dispatch'] else 'all')}"
    return pytest.param(Fold.parse(fold, ranks), row, id=name, marks=marks)


OTHER = [
    _other("tp2 cp2 | ep4", 4, "swipe", mark=""),
    _other("tp2 | ep2", 2, "topology", mark=""),
    _other("| ep2", 2, "swipe", mark="more", dispatch={}, empty=True),
    _other("cp2 | ep2", 4, "topology and bias", dispatch={}, empty=True),
    _other("| ep2", 2, "bias", mark="more", microbatches=2, aux_loss="microbatch", dispatch={}, short=True),
    _other("pp2 | ep2", 4, "bias", "zbv", mark="", aux_loss="microbatch", short=True),
    _other("pp2", 2, "deepseek", "1f1b", aux_loss="sequence", short=True),
    _other("pp2", 2, "bias", "gpipe", aux_loss="global_batch", dispatch={}, short=True),
    _other("pp2", 2, "deepseek", "zbv", aux_loss="global_batch"),
    _other("pp2", 2, "swipe", "dualpipev", padding="left"),
    _other("pp2", 2, "noise", "dualpipev", accumulate=2),
    _other("tp2 pp2 | ep2", 4, "swipe", "zbv", padding="left"),
    _other("pp2 cp2 | ep2", 4, "topology and bias", "dualpipev", aux_loss="huggingface"),
    _other("tp2 pp2 | etp2", 4, "groups", "zbv", dispatch={"capacity_factor": 0.7, "dispatcher": "deduplicated"}),
    _other("pp2 | ep2", 4, "bias", "zbv", dispatch={"capacity_factor": 0.8, "dispatcher": "allgather"}, sharding="none"),
    _other("pp2 | ep2", 4, "sigmoid", "zbv", dispatch={"capacity_factor": 1.0, "pad_to_capacity": True}),
    _other("cp2 | ep2", 4, "topology", accumulate=2, recompute="full", aux_loss="microbatch"),
    _other("tp4 | ep4", 4, "swipe", recompute="full", sharding="full", aux_loss="off"),
    _other("cp4 | ep2", 4, "deepseek", dispatch={"capacity_factor": 0.6, "drop_policy": "probs"}),
]  # fmt: skip


SOME = _cases(list(Fold.enumerate(2)), 1, seed=1) + _cases(FOUR, 1, seed=2)


@pytest.mark.parametrize(("fold", "row"), quick(SOME, SOME[-4].values))
def test_some_folds(pool: RankPool, checkpoint: Path, fold: Fold, row: dict[str, Any]) -> None:
    check(pool, checkpoint, fold, row)


@pytest.mark.parametrize(("fold", "row"), OTHER)
@pytest.mark.more
def test_dropping_and_schedules(
    pool: RankPool, checkpoint: Path, deep_checkpoint: Path, fold: Fold, row: dict[str, Any]
) -> None:
    check(pool, deep_checkpoint if fold.pp > 1 else checkpoint, fold, row)


@pytest.mark.more
def test_biases_and_noise_go_on_under_another_fold(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """Three steps under three folds, each from the last one's checkpoint; then both ways out to Hugging Face's format."""
    row = {**TABLE[0], "router": "noise", "padding": "none", "microbatches": 2, "accumulate": 1}
    spec, folds = spec_of(row), ["pp2", "tp2 | ep2", "| ep2"]
    ranks = [Fold.parse(fold, 2).dp for fold in folds]
    batches = [make_batches(1, n, 4 // n, LENGTH, 96, seed=i)[0] for i, n in enumerate(ranks)]
    expected = naive.train_alone(str(checkpoint), batches, spec)
    saved, written, again = tmp_path / "last.ckpt", tmp_path / "written", tmp_path / "again"
    biased = str(checkpoint.parent / "biased")
    actual = pool.run(
        jobs_folds.stop_and_resume, biased, folds, batches, spec, str(saved), str(written), ranks=2, timeout=180
    )
    assert_close_by_name(assemble(run.weights for run in actual), expected.weights, 1e-9, "weights")
    for layer, bias in expected.bias.items():
        assert actual[0].bias[layer].tolist() == pytest.approx(bias, abs=1e-12)
    export(saved, again)
    for path in (written, again):
        model = MoECausalLM.from_pretrained(path)
        assert model.config.router == RouterOptions(**ROUTERS["noise"])
        for layer, bias in expected.bias.items():
            found = model.moe_layers()[layer].gate.e_score_correction_bias
            torch.testing.assert_close(found, torch.tensor(bias), rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="so there is nothing to compare with; take router"):
        verify(again, "", 1)
    with pytest.warns(UserWarning, match="will route differently in transformers, whose qwen3_moe does not know"):
        model.save_pretrained(again)
    assert AutoModelForCausalLM.from_pretrained(again) is not None


@pytest.mark.parametrize("precision", quick(["bf16-mixed", "bf16-true"], "bf16-mixed"))
@pytest.mark.more
def test_precisions(pool: RankPool, checkpoint: Path, precision: str) -> None:
    """Biases stay in float32, and 16 bits give about what float32 gives."""
    row = {**TABLE[0], "router": "deepseek", "aux_loss": "sequence", "z": 0.02, "padding": "right", "recompute": "full"}
    spec, path = spec_of({**row, "microbatches": 1, "accumulate": 1}), str(checkpoint.parent / "biased")
    batches = make_batches(2, 1, 5, LENGTH, 96, seed=3, padding="right")
    plain, narrow = (
        pool.run(jobs_folds.train, path, "tp2 | ep2", batches, spec | {"precision": p}, ranks=2)
        for p in ("32-true", precision)
    )
    for name in ("losses", "aux_losses", "z_losses"):
        assert getattr(narrow[0], name) == pytest.approx(getattr(plain[0], name), rel=0.03), name
        assert getattr(narrow[0], name) == getattr(narrow[1], name)
    for layer, bias_E in narrow[0].bias.items():
        assert bias_E.dtype == torch.float32
        assert torch.equal(bias_E, narrow[1].bias[layer])
    grads = [assemble(run.grads[0] for run in ranks)["model.layers.0.mlp.gate.weight"] for ranks in (plain, narrow)]
    assert torch.cosine_similarity(*(grad.float().flatten() for grad in grads), dim=0) > 0.95


def test_recipe_takes_router_options(checkpoint: Path) -> None:
    overrides = {"router": {"bias_update_rate": 0.01}, "aux_loss": "sequence"}
    module = FineTuneModule(str(checkpoint), initial_seed=1, aux_loss=False, config_overrides=overrides)
    module.configure_model()
    assert module.model.config.router == RouterOptions(bias_update_rate=0.01)
    assert (module.model.config.aux_loss, module.model.config.output_router_logits) == ("sequence", False)
    assert written_config(module.model.config)["router"] == {"bias_update_rate": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=range(len(TABLE)))
@pytest.mark.parametrize("fold", [Fold(1), Fold.parse("tp2", 2), Fold.parse("pp2 cp2 | ep2", 4)], ids=str)
def test_all_rows(pool: RankPool, checkpoint: Path, fold: Fold, row: dict[str, Any]) -> None:
    check(pool, checkpoint, fold, fit(fold, row))


@pytest.mark.slow
@pytest.mark.parametrize(("fold", "row"), _cases(list(Fold.enumerate(4)), 2, seed=3))
def test_all_folds_of_four(
    pool: RankPool, checkpoint: Path, deep_checkpoint: Path, fold: Fold, row: dict[str, Any]
) -> None:
    check(pool, deep_checkpoint if fold.pp == 4 else checkpoint, fold, row)
