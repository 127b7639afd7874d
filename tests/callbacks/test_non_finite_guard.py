# SPDX-License-Identifier: Apache-2.0
"""A NaN changes nothing that lasts, under any fold, and is traced to its layer and rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moefold.callbacks import NonFiniteGuard
from lightning_moefold.callbacks.loss_spikes import SpikeDetector
from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.callbacks import jobs_non_finite_guard as jobs
from tests.quick import quick

ATTENTION = "model.layers.1.self_attn.o_proj"
PLACES = {
    # fold: (spec, ranks, name, layer, family)
    "tp2 | ep2 etp2": ({"module": ATTENTION, "what": "output", "rank": 2}, (2,), ATTENTION, 1, "attention"),
    "pp2 tp2 | etp2": ({"module": ATTENTION, "what": "output", "rank": 2}, (2,), ATTENTION, 1, "attention"),
    "cp2 | ep4": ({"module": "model.layers.1.post_attention_layernorm", "what": "gradient", "rank": 1}, (1,),
                  "model.layers.1.mlp", 1, "feed-forward"),  # whose input it is
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen3_moe", num_experts=4, num_hidden_layers=2))


@pytest.fixture(scope="module")
def expected(pool: RankPool, path: str) -> Any:
    """One process that never sees the bad batch."""
    [result] = pool.run(jobs.fit, path, "", {}, {}, None, ranks=1)
    return result


@pytest.mark.parametrize(
    "fold", quick(["tp2 | ep2 etp2", "pp2 tp2 | etp2", "cp2 | ep4"], "tp2 | ep2 etp2", "pp2 tp2 | etp2")
)
def test_a_skipped_step_leaves_no_trace(pool: RankPool, path: str, expected: Any, fold: str) -> None:
    spec, ranks, name, layer, family = PLACES[fold]
    results = pool.run(jobs.fit, path, fold, spec, {}, ranks=4)
    theirs, _, loads, own = expected
    for report, events, _, mine in results:
        event = jobs.event_of(events)
        assert (event.step, event.layer, event.family, event.ranks, event.batch) == (
            jobs.BAD + 1,
            layer,
            family,
            ranks,
            jobs.BAD,
        )
        assert name in event.name
        assert mine["running"] == own["running"]
        assert mine["steps"] == own["steps"] + 1  # a skipped step is counted
        if "pp" not in fold:
            assert mine["biases"][-1] == own["biases"][-1]
    assert_close_by_name(assemble(r.weights for r, *_ in results), assemble([theirs.weights]), 1e-8, fold)
    assert_close_by_name(assemble(r.state for r, *_ in results), assemble([theirs.state]), 1e-8, fold)
    for number, load_E in loads.items():
        ours = [found[number] for _, _, found, _ in results if number in found]
        assert [sum(column) for column in zip(*ours, strict=True)] == load_E


@pytest.mark.parametrize(
    ("fold", "arguments", "options"),
    quick(
        [
            ("tp2 | ep2 etp2", {"precision": "bf16-mixed"}, {}),
            ("tp2 | ep2", {"precision": "bf16-true", "masters": True}, {"data_parallel_sharding": "full"}),
            ("| ep2 etp2", {"accumulate_grad_batches": 2}, {"data_parallel_sharding": "none"}),
            ("pp2 tp2 | etp2", {"precision": "bf16-mixed"}, {"num_microbatches": 4, "pipeline_schedule": "1f1b"}),
            ("pp2 | ep2", {}, {"num_microbatches": 2, "pipeline_schedule": "gpipe"}),
            ("tp2 | ep4", {}, {"recompute": "full"}),
        ],
        ("tp2 | ep2", {"precision": "bf16-true", "masters": True}, {"data_parallel_sharding": "full"}),
    ),
)  # fmt: skip
def test_everywhere_a_skip_is_as_if_the_batch_were_not_there(
    pool: RankPool, path: str, fold: str, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Compared bit by bit with the same fold, which is not given the batch (with accumulation: nor its neighbour)."""
    arguments = dict(arguments)
    spec = {"masters": arguments.pop("masters", False), "both": "accumulate_grad_batches" in arguments}
    # The embedding's output spoils the whole forward, wherever it is.
    poison = {"module": "model.embed_tokens", "what": "output", "rank": 0}
    for (ours, events, _, mine), (theirs, _, _, own) in zip(
        pool.run(jobs.fit, path, fold, {**spec, **poison}, arguments, ranks=4, **options),
        pool.run(jobs.fit, path, fold, spec, arguments, None, ranks=4, **options),
        strict=True,
    ):
        event = jobs.event_of(events)
        assert (event.layer, event.family, event.what) == (None, "embedding", "output"), event
        assert event.ranks[0] == 0
        assert mine["running"] == own["running"]
        assert mine["biases"][-1] == own["biases"][-1]
        assert mine["steps"] == own["steps"] + 1
        for name, piece in theirs.weights.items():
            assert all(a.equal(b) for a, b in zip(ours.weights[name][2], piece[2], strict=True)), name
        for name, piece in theirs.state.items():
            assert all(a.equal(b) for a, b in zip(ours.state[name][2], piece[2], strict=True)), name


def test_a_run_that_stops_keeps_its_last_good_checkpoint(pool: RankPool, path: str, tmp_path: Path) -> None:
    spec = {"module": ATTENTION, "what": "output", "rank": 1}
    results = pool.run(jobs.stopped, path, "tp2 | ep2", spec, str(tmp_path), ranks=2)
    sentences = {sentence for sentence, _, _ in results}
    [sentence] = sentences
    assert sentence.startswith(
        f"step 3: the loss and the gradients are not finite; first the output of model.{ATTENTION} "
    )
    assert "(layer 1, attention) on rank 1" in sentence
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]


def test_weights_that_are_not_finite_are_not_saved(pool: RankPool, path: str, tmp_path: Path) -> None:
    [sentence] = set(pool.run(jobs.overflowed, path, "| ep2", str(tmp_path), True, ranks=2))
    assert sentence == (
        "the checkpoint of step 3 is not written, because model.model.layers.0.mlp.experts.up_proj is not finite on rank 1; "
        "resume from an earlier checkpoint."
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    [sentence] = set(pool.run(jobs.overflowed, path, "| ep2", str(tmp_path), False, ranks=2))
    assert "step 4: " in sentence
    assert "first the weight of model.model.layers.0.mlp.experts.up_proj (layer 0, experts) on rank 1" in sentence


def test_bad_settings_and_strategies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use 'stop' or 'skip'"):
        NonFiniteGuard("continue")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spike_width=0 must be above 0"):
        NonFiniteGuard(spike_width=0)
    assert "use MoEFoldStrategy, or leave the guard out" in jobs.plain_strategy(str(tmp_path))


def test_spikes_are_far_above_the_latest_losses() -> None:
    detector = SpikeDetector(10.0, needed=4)
    assert [detector.add(loss) for loss in (3.0, 2.9, 3.1, 2.95, 3.2)] == [None] * 5
    assert detector.add(5.0) == pytest.approx(3.0)
    assert detector.add(5.0) == pytest.approx(3.0)  # a spike does not make the next one usual
    assert detector.add(3.1) is None
    still = SpikeDetector(10.0, needed=2)
    assert [still.add(loss) for loss in (2.0, 2.0, 2.01)] == [None] * 3  # no deviation at all, and 0.5% more


def test_a_spike_is_logged_with_its_rows(pool: RankPool, path: str) -> None:
    for spikes in pool.run(jobs.spiking, path, "tp2 | ep2", ranks=2):
        [spike] = spikes
        assert (spike["step"], spike["data_rank"]) == (20, None)
        assert spike["loss"] > 5 * spike["usual"]
        [rows] = spike["batches"]
        assert rows.startswith("batch 19 of epoch 0, rows ")
        assert rows.split(", rows ")[1].split(" of ")[0].split(", ")[0] == "38"
