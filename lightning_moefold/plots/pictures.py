# SPDX-License-Identifier: Apache-2.0
"""The list of pictures of a run.

A picture is one entry of :data:`PICTURES`: a function that draws it from a :class:`~.read.Run`, or returns None if the
run has no data for it, and a sentence that then says what was looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_moefold.plots.curves import draw_loss, draw_memory, draw_metrics, draw_speed
from lightning_moefold.plots.files import EXPERT_LOAD
from lightning_moefold.plots.load import draw_expert_load
from lightning_moefold.plots.placement import draw_run_placement
from lightning_moefold.plots.read import Run
from lightning_moefold.plots.style import save_figure
from lightning_moefold.plots.timeline import draw_timeline


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: Name of its file, without ``.png``.
        draw: Function that returns the figure, or None if the run has no data for it.
        missing: Sentence to print in that case; None to say nothing.
    """

    name: str
    draw: Callable[[Run], Any]
    missing: str | None


def write_pictures(run: Run, folder: Path) -> tuple[list[Path], list[str]]:
    """Draws all pictures that the run has data for.

    Args:
        run: The run.
        folder: Output folder; created if it does not exist.

    Returns:
        The files written, and a sentence for each picture without data.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    written, missing = [], []
    for picture in PICTURES:
        if (figure := picture.draw(run)) is not None:
            written.append(save_figure(figure, folder / f"{picture.name}.png"))
        elif picture.missing is not None:
            missing.append(f"No {picture.name}.png: {picture.missing}")
    return written, missing


PICTURES = (
    Picture("loss", draw_loss, "no metric whose name ends in loss was logged to a metrics.csv."),
    Picture("speed", draw_speed, "no train/mfu, train/tokens_per_second or train/step_time, which MFUMonitor logs."),
    Picture("memory", draw_memory, "no train/memory_..._gb, which MFUMonitor logs."),
    Picture("expert_load", draw_expert_load, f"no {EXPERT_LOAD}, which LoadBalanceMonitor writes when training ends."),
    Picture("placement", draw_run_placement, None),  # most runs neither move experts nor have a pipeline
    Picture("pipeline", draw_timeline, None),
    Picture("metrics", draw_metrics, None),
)
