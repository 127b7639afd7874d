# SPDX-License-Identifier: Apache-2.0
"""``moefold plot``: arguments and printing."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_moefold.plots.pictures import write_pictures
from lightning_moefold.plots.plans import read_plans, write_plots
from lightning_moefold.plots.read import read_run, read_runs


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold plot``."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="directory with a run's logs, at any depth; several to compare; or a file of moefold plan --json",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the PNGs go (default: plots, beside the logs or file)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold plot``; returns 0 if there was anything to draw, otherwise 1."""
    first, *others = arguments.runs
    if first.is_file() and not others:
        for path in write_plots(read_plans(first), arguments.output or first.parent / "plots"):
            print(path)
        return 0
    found = read_runs(arguments.runs) if others else read_run(first)
    written, missing = write_pictures(found, arguments.output or first / "plots")
    for path in written:
        print(path)
    for sentence in [*found.notes, *missing]:
        print(f"* {sentence}")
    return 0 if written else 1
