# SPDX-License-Identifier: Apache-2.0
"""``moefold verify``: arguments and printing."""

from __future__ import annotations

import argparse

from lightning_moefold.fold import Fold
from lightning_moefold.modules.recompute_parts import parse_recompute
from lightning_moefold.testing import RankError
from lightning_moefold.testing.verification import TOLERANCE, verify


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold verify``."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="model in Hugging Face format, or its name on the hub")
    add("--fold", required=True, help='such as "tp2 | ep4"')
    add("--ranks", type=int, required=True, help="CPU ranks to start")
    add(
        "--layers", type=int, help="take the first layers of the model only (float64 takes 32 bytes a parameter, twice)"
    )
    add("--steps", type=int, default=2, help="optimizer steps (2)")
    add("--length", type=int, default=16, help="tokens of a row (16)")
    add("--num-microbatches", type=int, default=1, help="micro-batches (1)")
    add(
        "--sharding",
        choices=["optimizer", "full", "none"],
        default="optimizer",
        help="data-parallel storage (optimizer)",
    )
    add("--recompute", default="none", help="recomputed activations: selective, full, or parts such as norm,moe (none)")
    add(
        "--exchange",
        choices=["auto", "ring", "all_gather", "all_to_all"],
        default="auto",
        help="attention over cp (auto)",
    )
    add("--schedule", default="1f1b", help="of the pipeline (1f1b)")
    add("--stages-per-rank", type=int, default=1, help="pipeline stages on each rank (1)")
    add("--seed", type=int, default=0, help="of the tokens (0)")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold verify``; returns 0 only if the fold computes the same as one process."""
    strategy = {
        "num_microbatches": arguments.num_microbatches, "data_parallel_sharding": arguments.sharding,
        "recompute": parse_recompute(arguments.recompute), "context_parallel_exchange": arguments.exchange,
        "pipeline_schedule": arguments.schedule, "num_stages_per_rank": arguments.stages_per_rank,
    }  # fmt: skip
    try:
        findings = verify(
            arguments.checkpoint, arguments.fold, arguments.ranks, layers=arguments.layers, steps=arguments.steps,
            length=arguments.length, seed=arguments.seed, strategy=strategy,
        )  # fmt: skip
    except RankError as failed:
        raise failed.for_user() from failed
    print(f"{Fold.parse(arguments.fold, arguments.ranks)} against Hugging Face's code in one process, float64\n")
    width = max(len(f.what) for f in findings)
    for finding in findings:
        verdict = "ok" if finding.holds else "WRONG"
        print(f"  {finding.what:<{width}}  largest error {finding.error:.1e}  {verdict:<5}  ({finding.where})")
    exact = all(f.holds for f in findings)
    print(f"\n{'exact' if exact else 'NOT exact'}: errors {'below' if exact else 'above'} {TOLERANCE:g}")
    return 0 if exact else 1
