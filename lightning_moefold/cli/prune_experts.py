# SPDX-License-Identifier: Apache-2.0
"""``moefold prune-experts``: a checkpoint with the best experts of each layer."""

from __future__ import annotations

import argparse
from functools import partial

from lightning_moefold.checkpoint.hf_writer import check_output
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.cli.calibrating import add_calibration, calibration_of, run_calibrated
from lightning_moefold.compression.expert_pruning import number_to_keep, prune_experts, score_experts
from lightning_moefold.compression.report import table
from lightning_moefold.compression.scores import EXPERT_SCORES, expert_score
from lightning_moefold.models import MoEConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold prune-experts``."""
    add_calibration(parser)
    add = parser.add_argument
    add("--keep", required=True, type=float, help="share of the experts of a layer that stay, such as 0.5")
    add("--score", default="reap", help=f"{', '.join(EXPERT_SCORES)} (reap)")
    add("--output", required=True, metavar="DIR", help="directory to write; one with a model is replaced")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold prune-experts``."""
    expert_score(arguments.score)
    count = number_to_keep(MoEConfig.from_pretrained(arguments.checkpoint), arguments.keep)
    check_output(arguments.output, local_directory(arguments.checkpoint))
    work = partial(score_experts, arguments.checkpoint, calibration_of(arguments), score=arguments.score)
    scores, writes = run_calibrated(work, arguments)
    if not writes:
        return 0
    kept = prune_experts(arguments.checkpoint, scores, arguments.output, arguments.keep)
    rows = [["layer", "lowest score", "highest score", "experts that stay"]]
    for layer, score_E in scores.items():
        stay = ", ".join(map(str, kept[layer][:12])) + (f" and {count - 12} more" if count > 12 else "")
        rows.append([str(layer), f"{score_E.min():.4g}", f"{score_E.max():.4g}", stay])
    print(table(rows))
    print(f"\n{arguments.output} written: {count} experts in each layer, chosen by {arguments.score}")
    return 0
