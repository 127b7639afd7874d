# SPDX-License-Identifier: Apache-2.0
"""What the pipeline of a step is recorded as, and that a run's picture can be drawn from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lightning_moefold.callbacks.timeline import PipelineTimeline
from lightning_moefold.cli.main import main
from lightning_moefold.planner.cost.simulate import Event, Timeline, chrome_trace
from lightning_moefold.plots import read_run
from lightning_moefold.plots.files import PIPELINE_TIMELINE
from lightning_moefold.plots.read import read_timeline
from lightning_moefold.plots.timeline import draw, idle_shares
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.callbacks import jobs_timeline


def test_a_recorded_step(pool: RankPool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "mixtral", "mixtral", num_hidden_layers=4)
    pool.run(jobs_timeline.fit, str(checkpoint), str(tmp_path / "run"), "zbv", ranks=2)
    timeline = read_run(tmp_path / "run").timeline
    assert timeline is not None
    assert timeline.ranks == 2
    # Three micro-batches through four stages: forward, and backward in two parts where the schedule splits it.
    kinds = Counter((kind, stage) for kind, stage, _ in (event.op for event in timeline.events))
    assert all(kinds["F", stage] == kinds["B", stage] == 3 for stage in range(4))
    assert sum(count for (kind, _), count in kinds.items() if kind == "W") > 0
    assert {event.rank for event in timeline.events if event.op[1] in (0, 3)} == {0}
    done = {event.op: event for event in timeline.events}
    for (kind, stage, number), event in done.items():
        if kind == "F" and stage:
            assert event.start >= done["F", stage - 1, number].end
        if kind == "B" and stage < 3:
            assert event.start >= done["B", stage + 1, number].end
    assert all(0 < share < 1 for share in idle_shares(timeline))


def test_a_picture_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        Event(0, ("F", 0, 0), 0, 1), Event(1, ("F", 1, 0), 1, 2), Event(1, ("B", 1, 0), 2, 4), Event(0, ("B", 0, 0), 4, 6),
    ]  # fmt: skip
    timeline = Timeline(tuple(events), 2)
    (tmp_path / PIPELINE_TIMELINE).write_text(chrome_trace(timeline))
    assert read_timeline(tmp_path / PIPELINE_TIMELINE) == timeline
    assert idle_shares(timeline) == [0.5, 0.5]
    assert main(["plot", str(tmp_path)]) == 0
    assert str(tmp_path / "plots" / "pipeline.png") in capsys.readouterr().out
    (tmp_path / PIPELINE_TIMELINE).write_text('{"traceEvents": [{"ph": "X"}]}')
    with pytest.raises(ValueError, match="no trace of a pipeline"):
        read_run(tmp_path)


def test_passes_of_a_pair_share_their_time() -> None:
    events = [
        Event(0, ("F", 0, 2), 0, 3),
        Event(0, ("B", 1, 0), 1, 4),
        Event(0, ("F", 0, 3), 4, 6),
        Event(1, ("F", 1, 0), 5, 8),
    ]
    timeline = Timeline(tuple(events), 2)
    assert idle_shares(timeline) == [0.25, 0.625]
    assert timeline.idle_fraction == (0.25 + 0.625) / 2
    bars = [bar for bar in draw(timeline, "").axes[0].patches if bar.get_height()]
    assert sorted((bar.get_x(), round(bar.get_height(), 6), round(bar.get_y(), 6)) for bar in bars) == [
        (0, 0.4, -0.4), (1e3, 0.4, 0.0), (4e3, 0.8, -0.4), (5e3, 0.8, 0.6),
    ]  # fmt: skip


def test_steps_from_one_on() -> None:
    with pytest.raises(ValueError, match="step=0 must be at least 1"):
        PipelineTimeline(0)
