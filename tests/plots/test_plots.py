# SPDX-License-Identifier: Apache-2.0
"""What is read of a run, and that its pictures are made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_moefold.balance.placement import Placement
from lightning_moefold.callbacks.expert_load import ExpertLoad, LoadHistory, LoadRow
from lightning_moefold.callbacks.placement_history import PlacementHistory
from lightning_moefold.cli.main import main
from lightning_moefold.plots import read_run
from lightning_moefold.plots.curves import (
    draw_loss,
    draw_memory,
    draw_metrics,
    draw_speed,
    loss_names,
    metric_panels,
    other_names,
)
from lightning_moefold.plots.files import EXPERT_LOAD, EXPERT_PLACEMENT, NO_EXPERT
from lightning_moefold.plots.lines import smooth, top_of
from lightning_moefold.plots.load import draw_expert_load, imbalance
from lightning_moefold.plots.placement import draw_run_placement
from lightning_moefold.plots.read import RecordedLoad, read_runs
from lightning_moefold.plots.style import load_colors
from lightning_moefold.plots.versions import NEWEST
from tests.quick import quick

MONITORED = {"train/mfu": 0.25, "train/tokens_per_second": 1e4, "train/step_time": 0.5, "train/memory_peak_gb": 3.0}


def write_metrics(folder: Path, version: int = 0, steps: int = 4, age: float = 0.0, **more: float) -> Path:
    """Through Lightning's own logger: a training loss at each step, a validation at the second and twice at the last."""
    logger = CSVLogger(folder, name="logs", version=version)
    for step in range(steps):
        logger.log_metrics({"train/loss": torch.tensor(4.0 - step), **MONITORED, **more}, step)
        if step == 1:
            logger.log_metrics({"val/loss": 3.5}, step)
    logger.log_metrics({"val/loss": 2.5}, steps - 1)
    logger.log_metrics({"val/loss": 9.0}, steps - 1)  # as when the best checkpoint is validated after training
    logger.save()
    path = Path(logger.log_dir) / "metrics.csv"
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def write_load(folder: Path) -> None:
    history = LoadHistory([1, 3], [(10, np.array([[4, 0, 2], [1, 3, -1]])), (20, np.array([[2, 2, 2], [0, 0, -1]]))])
    history.save(folder / EXPERT_LOAD)


def test_metrics_by_step(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    run = read_run(tmp_path)
    assert list(run.versions) == ["version_0"]
    (loss,), (val,) = run.having("train/loss").values(), run.having("val/loss").values()
    assert loss.steps.tolist() == [1, 2, 3, 4]
    assert loss.values.tolist() == [4, 3, 2, 1]
    assert (val.steps.tolist(), val.values.tolist()) == ([2, 4], [3.5, 2.5])
    assert run.names() == sorted([*MONITORED, "train/loss", "val/loss"])
    assert run.load is None
    assert run.notes == []
    assert list(read_run(tmp_path / "logs" / "version_0").versions) == ["version_0"]


def test_newest_versions(tmp_path: Path) -> None:
    for version in range(NEWEST + 2):
        write_metrics(tmp_path, version, age=version)  # the first is the newest
    run = read_run(tmp_path)
    assert list(run.versions) == [f"version_{v}" for v in reversed(range(NEWEST))]
    assert run.notes == [f"{NEWEST + 2} versions were found; the pictures show the newest {NEWEST}."]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("train/loss,step,note\n3.0,0,\nnan,1,hello\ninf,2,\n1.0,3,\n")
    run = read_run(tmp_path)
    (series,) = run.having("train/loss").values()
    assert (series.steps.tolist(), series.values.tolist(), series.left_out) == ([1, 4], [3, 1], 2)
    assert run.names() == ["train/loss"]
    assert run.notes == [f"train/loss in {path} has 2 values that are not finite and not shown."]


def test_load(tmp_path: Path) -> None:
    write_load(tmp_path / "deep" / "down")
    load = read_run(tmp_path).load
    assert load is not None
    assert (load.steps.tolist(), load.layers.tolist()) == ([10, 20], [1, 3])
    nan = np.nan
    np.testing.assert_allclose(load.shares()[0], [[2, 0, 1], [0.5, 1.5, nan]])
    np.testing.assert_allclose(load.shares()[1], [[1, 1, 1], [nan, nan, nan]])
    np.testing.assert_allclose(imbalance(load), [[2, 1.5], [1, nan]])


def write_placement(folder: Path) -> None:
    """Two layers of four and two experts; in the second interval the experts 1 and 2 of the first have changed places."""
    history, rows = PlacementHistory(4), [LoadRow(1, "a", 4, None), LoadRow(3, "b", 2, None)]
    for step, slots in ((10, (0, 1, 2, 3)), (20, (0, 2, 1, 3))):
        counts_LE, rank_rows_LR = np.array([[6, 3, 1, 0], [5, 5, -1, -1]]), np.array([[4, 1, 3, 2], [3, 2, 2, 3]])
        load = ExpertLoad(rows, counts_LE, np.zeros_like(counts_LE), rank_rows_LR)  # two replicas of two ranks
        history.add(step, load, {"a": Placement(slots, 2), "b": Placement.contiguous(2, 2)})
    history.save(folder / EXPERT_PLACEMENT)


def test_placement(tmp_path: Path) -> None:
    write_placement(tmp_path)
    run = read_run(tmp_path)
    found = run.placement
    assert found is not None
    assert (found.first, found.steps.tolist(), found.layers.tolist()) == (4, [10, 20], [1, 3])
    assert found.parts_NLE.tolist() == [[[0, 0, 1, 1], [0, 1, -1, -1]], [[0, 1, 0, 1], [0, 1, -1, -1]]]
    assert found.home_NLP.tolist() == [[[9, 1], [5, 5]]] * 2
    assert found.rows_NLP.tolist() == [[[7, 3], [5, 5]]] * 2
    figure = draw_run_placement(run)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Layer 1: rank of each expert (2 moves, the most of any layer)" in titles
    assert "Rows of each rank, if no expert had moved or been copied: busiest 1.80 times the mean" in titles
    assert "Rows of each rank, as computed, with moves and copies: busiest 1.40 times the mean" in titles


@pytest.mark.parametrize("missing", ["folder", "files", "step", "broken"])
def test_nothing_to_draw(tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "neither a metrics.csv (written by Lightning's CSVLogger) nor an expert_load.npz (by LoadBalanceMonitor)"
    if missing == "folder":
        expected = "is no directory"
    elif missing == "step":
        (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
        expected = "has no column named step"
    elif missing == "broken":
        (tmp_path / EXPERT_LOAD).write_bytes(b"PK\x03\x04 cut off")
        expected = "not what LoadBalanceMonitor writes"
    assert main(["plot", str(tmp_path / "none" if missing == "folder" else tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_which_metric_is_a_loss() -> None:
    names = ["epoch", "lr-AdamW", "loss", "train/loss_step", "train/loss_epoch", "train/lm_loss", "val/loss", "val_loss",
             "test/loss_epoch", "train/aux_loss", "train/z_loss", "train/loss_scale", "moe/load_imbalance", "glossy"]  # fmt: skip
    assert loss_names(names) == (
        ["loss", "train/loss_step", "train/lm_loss"],
        ["val/loss", "val_loss", "test/loss_epoch"],
        ["train/aux_loss", "train/z_loss"],
    )


def test_smoothing() -> None:
    line = np.linspace(5, 1, 400)
    np.testing.assert_allclose(smooth(line)[4:-4], line[4:-4])
    noise = np.random.default_rng(0).normal(size=5000)
    assert smooth(noise).std() < 0.2 * noise.std()
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0])), [1.5, 3, 4])


def test_top_of_a_long_curve() -> None:
    steep = 2 + 10 * np.exp(-np.arange(1000) / 10)
    top = top_of(steep)
    assert top is not None
    assert steep[20] < top < steep[0]
    assert top_of(steep[:100]) is None  # short enough to be seen whole
    assert top_of(np.linspace(3, 2, 1000)) is None  # nothing stands out


def pngs(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.png"))
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in files)
    return [file.stem for file in files]


@pytest.mark.parametrize("versions", quick([1, 2], 2))
def test_pictures_of_a_run(tmp_path: Path, versions: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for version in range(versions):
        path = write_metrics(tmp_path, version, 300, **{"train/hfu": 0.2, "train/aux_loss": 2.0})
    write_load(path.parent)
    write_placement(path.parent)
    assert main(["plot", str(tmp_path)]) == 0
    assert pngs(tmp_path / "plots") == ["expert_load", "loss", "memory", "placement", "speed"]
    assert capsys.readouterr().out.count("\n") == 5  # nothing is said about the pipeline, of which there is none
    assert main(["plot", str(tmp_path)]) == 0  # its own pictures are in nobody's way


def test_words_in_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path, **{"train/memory_allocated_gb": 2.9})
    run = read_run(tmp_path)
    (memory,) = draw_memory(run).axes
    (line,) = memory.get_lines()  # on a CPU there is one figure
    assert (line.get_label(), line.get_ydata().tolist()) == ("resident", [2.9] * 4)
    titles = [axes.get_title(loc="right") for axes in draw_speed(run).axes]
    assert titles == ["median 25%", "median 10,000 tokens/s", "median 0.5 s"]

    on_gpu = tmp_path / "gpu"
    write_metrics(on_gpu, **{"train/memory_allocated_gb": 2.9, "train/memory_reserved_gb": 3.5})
    (memory,) = draw_memory(read_run(on_gpu)).axes
    assert [line.get_label() for line in memory.get_lines()] == ["peak", "reserved", "allocated"]

    for steps, words in (([10, 20], "steps 11 to 20"), ([18, 19], "step 19"), ([5], "up to step 5")):
        run.load = RecordedLoad(np.array(steps), np.arange(2), np.ones((len(steps), 2, 4), dtype=np.int64))
        assert draw_expert_load(run).axes[0].get_title(loc="left") == f"Latest interval, {words}"


def test_a_version_has_one_color(tmp_path: Path) -> None:
    """Also where a version, such as that of a later validation, lacks a metric."""
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path, 0, age=1)
    logger = CSVLogger(tmp_path, name="logs", version=1)
    logger.log_metrics({"val/loss": 2.0}, 0)
    logger.save()
    lines = draw_loss(read_run(tmp_path)).axes[0].get_lines()
    colors = {line.get_label(): line.get_color() for line in lines}
    assert colors.keys() == {
        f"{name}, version_{v}" for name, v in (("train/loss", 0), ("val/loss", 0), ("val/loss", 1))
    }
    assert colors["train/loss, version_0"] == colors["val/loss, version_0"]
    assert colors["val/loss, version_1"] != colors["val/loss, version_0"]


def test_each_expert_over_the_run(tmp_path: Path) -> None:
    """A row for each expert, a column for each interval; of many layers, those that are least even."""
    pytest.importorskip("matplotlib")
    write_load(tmp_path)
    run = read_run(tmp_path)
    panel = draw_expert_load(run).axes[1]
    np.testing.assert_allclose(panel.collections[0].get_array().filled(np.nan), [[2, 1], [0, 1], [1, 1], [0.5, np.nan],
                                                                                [1.5, np.nan], [np.nan, np.nan]])  # fmt: skip
    assert [text.get_text() for text in panel.get_yticklabels()] == ["layer 1", "layer 3"]
    assert panel.get_xlim() == (0, 20)
    counts = np.ones((3, 12, 128), dtype=np.int64)
    counts[1:, 4, :64], counts[:, 9, 5] = 3, 100
    run.load = RecordedLoad(np.array([10, 20, 30]), np.arange(12), counts)
    panel = draw_expert_load(run).axes[1]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["layer 4", "layer 9"]
    assert panel.get_title(loc="left") == "Each expert over the run, the 2 most uneven of 12 layers"


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    many = RecordedLoad(np.array([5]), np.arange(12), np.ones((1, 12, 4), dtype=np.int64))
    LoadHistory(many.layers.tolist(), [(5, many.counts_NLE[0])]).save(tmp_path / EXPERT_LOAD)
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "elsewhere")]) == 0
    assert pngs(tmp_path / "elsewhere") == ["expert_load"]
    printed = capsys.readouterr().out
    for name in ("loss", "speed", "memory"):
        assert f"* No {name}.png: no " in printed


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(tmp_path)]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err


def test_no_expert_is_no_load() -> None:
    load = RecordedLoad(np.array([1]), np.array([0]), np.array([[[3, NO_EXPERT, 1]]]))
    np.testing.assert_allclose(load.shares(), [[[1.5, np.nan, 0.5]]])


def test_metrics_of_the_users_own_are_drawn():
    names = ["epoch", "grad_norm", "lr-AdamW", "moe/rank_load_max_over_mean", "train/loss", "train/mfu", "val/acc"]
    assert other_names(names) == ["lr-AdamW", "grad_norm", "val/acc"]
    pairs = ["lr-AdamW/pg1", "lr-AdamW/pg2", "train/grad_norm", "train/grad_norm_expert", "val/acc"]
    assert metric_panels(pairs) == {"learning rate": pairs[:2], "gradient norm": pairs[2:4], "val/acc": ["val/acc"]}


def test_equal_learning_rates_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path, **{"lr/pg1": 0.5, "lr/pg2": 0.5, "train/grad_norm": 3.0, "train/grad_norm_expert": 0.01})
    rate, norm = draw_metrics(read_run(tmp_path)).axes
    assert [line.get_label() for line in rate.get_lines()] == ["lr/pg1, lr/pg2"]
    assert [line.get_label() for line in norm.get_lines()] == ["train/grad_norm", "train/grad_norm_expert"]
    assert (rate.get_yscale(), norm.get_yscale()) == ("linear", "log")


def test_colours_tell_high_loads_apart():
    pytest.importorskip("matplotlib")
    colours = load_colors(np.array([[0.0, 1.0, 2.1, 4.0]]))
    assert colours(2.1) < colours(4.0) == 1
    assert colours(1.0) == 0.5


def test_several_runs_in_one_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_metrics(tmp_path / name, version=0)
        write_metrics(tmp_path / name, version=1)
    run = read_runs([tmp_path / "a", tmp_path / "b"])
    assert list(run.versions) == ["a", "b"]
    assert run.title == "a, b"


def configure(metrics: Path, learning_rate: float, checkpoint: Path | None = None) -> None:
    text = {
        "ckpt_path": None if checkpoint is None else str(checkpoint),
        "model": {"init_args": {"learning_rate": learning_rate}},
        "trainer": {"default_root_dir": str(metrics.parent), "callbacks": [{"class_path": str(metrics)}]},
    }
    (metrics.parent / "config.yaml").write_text(yaml.safe_dump(text))


def test_legends_name_the_settings_that_differ(tmp_path: Path) -> None:
    configure(write_metrics(tmp_path, 0, age=1), 0.001)
    configure(write_metrics(tmp_path, 1), 0.01)
    run = read_run(tmp_path)
    assert list(run.versions) == ["version_0 (learning_rate 0.001)", "version_1 (learning_rate 0.01)"]
    pytest.importorskip("matplotlib")
    speed = draw_speed(run).axes
    assert [axes.get_legend() is not None for axes in speed] == [True, False, False]  # once is enough
    assert speed[0].get_title(loc="right") == "medians 25 and 25%"
    run.load = RecordedLoad(np.array([5]), np.arange(2), np.ones((1, 2, 4), dtype=np.int64))
    run.load_from = tmp_path / "logs" / "version_1"
    assert draw_expert_load(run).get_suptitle() == "Expert load: logs/version_1"  # that of one of them


def test_a_resumed_run_is_joined_with_the_run_before(tmp_path: Path) -> None:
    first, then = write_metrics(tmp_path, 0, 4, age=2), write_metrics(tmp_path, 1, 6, age=1)
    rows = [line for line in then.read_text().splitlines() if line]
    step = rows[0].split(",").index("step")
    then.write_text("\n".join(row for row in rows if row.split(",")[step] not in ("0", "1", "2")))  # from step 4 on
    os.utime(then, (1e9 - 1, 1e9 - 1))
    configure(first, 0.001)
    configure(then, 0.001, first.parent / "checkpoints" / "last.ckpt")
    aborted = tmp_path / "logs" / "version_2" / "metrics.csv"
    aborted.parent.mkdir()
    aborted.write_text("")
    configure(aborted, 0.001)
    run = read_run(tmp_path)
    assert list(run.versions) == ["version_1 (resumed from version_0)"]
    (metrics,) = run.versions.values()
    assert metrics["train/loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert metrics["train/loss"].values.tolist() == [4, 3, 2, 1, 0, -1]
    assert metrics["val/loss"].steps.tolist() == [2, 6]  # that of step 4 was measured by the first run, and not again
    assert run.notes == []
    alone = read_run(then.parent)  # also if only the second is named
    (metrics,) = alone.versions.values()
    assert metrics["train/loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    validated = CSVLogger(tmp_path, name="logs", version=3)  # moefold validate --ckpt_path
    validated.log_metrics({"val/loss": 2.0}, 0)
    validated.save()
    configure(Path(validated.log_dir) / "metrics.csv", 0.001, then.parent / "checkpoints" / "last.ckpt")
    assert list(read_run(tmp_path).versions) == ["version_1 (resumed from version_0)", "version_3"]
    shutil.rmtree(validated.log_dir)
    elsewhere = write_metrics(tmp_path.parent / f"{tmp_path.name}-more", 0, 8)
    rows = elsewhere.read_text().splitlines()
    elsewhere.write_text(
        "\n".join(row for row in rows if row and row.split(",")[step] not in ("0", "1", "2", "3", "4", "5"))
    )
    configure(elsewhere, 0.001, then.parent / "checkpoints" / "last.ckpt")
    run = read_runs([tmp_path, elsewhere.parents[2]])
    assert list(run.versions) == ["version_0 (resumed from version_0 and version_1)"]
