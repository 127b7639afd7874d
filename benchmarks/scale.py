# SPDX-License-Identifier: Apache-2.0
"""Ranks of folds of thousands, on no machine: what they hold, what they send, and what the planner says.

    python benchmarks/scale.py [--gpus 1024 4096] [--model mixtral-8x22b ...] [--fold "tp2 pp8 | ep8"] [--rank 5 ...]

By default the folds of the paper's table of mappings (MoE Parallel Folding, arXiv 2504.14960, table 3) that have a
pipeline, and a rank each of the first, a middle and the last stage, among those that store most. Each rank runs a step of the
real code with fake tensors (``testing/rehearsal/scale.py``): bf16-mixed, AdamW, rows of 4,096 tokens. Bytes are compared
with ``layout.py`` and with the planner, every collective with what the fold requires; the exit status is 0 only if all but the
planner's are as they should be. ``--brief`` prints no collectives.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lightning_moefold import Fold
from lightning_moefold.models import MoEConfig
from lightning_moefold.modules.attention.exchanges import EXCHANGES
from lightning_moefold.parallel import PipelinePlan
from lightning_moefold.planner.cost.memory import Memory
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.testing.rehearsal.expected import expected_messages
from lightning_moefold.testing.rehearsal.messages import Expected, Message, as_counter
from lightning_moefold.testing.rehearsal.planned import held, planned
from lightning_moefold.testing.rehearsal.scale import Rehearsal, Step, rehearse

FOLDS = {
    "mixtral-8x22b": ("tp2 pp8 | ep8", "tp2 pp8 | ep4 etp2"),
    "qwen2-57b-a14b": ("tp2 pp4 | ep4", "tp2 pp4 | ep4 etp2"),
}


def compare(done: Rehearsal, expected: Sequence[Expected], plan: Memory) -> None:
    """Prints what a rank holds, in GB, and how far off the planner is."""
    rest = plan.activations + plan.buffers + plan.logits
    parts = zip(("weights and gathered", "whole gradients", "moments", "the rest at the peak"), held(done, expected),
                (plan.weights, plan.gradients, plan.optimizer, rest), strict=True)  # fmt: skip
    print(
        "held, and the planner: "
        + ", ".join(f"{what} {real / 1e9:.3f} ({told / real - 1:+.2%})" for what, real, told in parts)
    )


def show(done: Rehearsal, expected: Sequence[Expected]) -> bool:
    """Prints each collective; returns whether all are what they must be."""
    print("| purpose | over | ranks | kind | calls | MB each | as required |")
    print("|---|---|--:|---|--:|--:|---|")
    required, every = as_counter(list(expected)), True
    rows: Counter[tuple[str, str, Message]] = Counter()
    for entry in expected:
        rows[entry.purpose, entry.axis, entry.message] += entry.count
    for (purpose, axis, message), count in rows.items():
        fits = done.messages[message] == required[message]
        every &= fits
        print(f"| {purpose} | {axis} | {len(message.ranks)} | {message.kind} | {count} | "
              f"{message.bytes / 1e6:.6g} | {'yes' if fits else done.messages[message]} |")  # fmt: skip
    for message in set(done.messages) - set(required):
        every = False
        print(f"| not required | | {len(message.ranks)} | {message.kind} | {done.messages[message]} | "
              f"{message.bytes / 1e6:.6g} | no |")  # fmt: skip
    return every


def work(name: str, config: MoEConfig, fold: Fold, rank: int, arguments: argparse.Namespace) -> bool:
    plan = PipelinePlan(arguments.schedule, arguments.stages)
    m = arguments.microbatches or 2 * fold.pp
    step = Step(config, m, arguments.length, plan, arguments.exchange, arguments.recompute)
    done = rehearse(step, fold, rank)
    expected = expected_messages(step, fold, rank, done.model.layouts)
    place = ", ".join(f"{axis} {index}" for axis, index in fold.coordinates(rank).items())
    print(f"\n{name}, {fold.world_size} ranks, `{fold}`, rank {rank} ({place}), {step.num_microbatches} micro-batches")
    print("mesh {mesh:.2f} s, model {build:.1f} s, step {step:.1f} s\n".format(**done.seconds))
    same = done.memory == done.promised
    promise = "as layout.py promises" if same else f"layout.py promises {done.promised}"
    print(", ".join(f"{part} {size / 1e9:.3f} GB" for part, size in done.memory.items()) + f": {promise}")
    compare(done, expected, planned(step, fold, rank))
    fits = done.messages == as_counter(expected)
    if arguments.brief:
        print(f"every collective as required: {'yes' if fits else 'no'}", flush=True)
    return (arguments.brief or show(done, expected)) and fits and same


def typical(fold: Fold) -> list[int]:
    """Of the first, a middle and the last stage, a rank that comes first among its data ranks, and so stores most."""
    return [stage * (fold.world_size // fold.pp) + fold.tp - 1 for stage in sorted({0, fold.pp // 2, fold.pp - 1})]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(FOLDS))
    parser.add_argument("--fold", nargs="+", help="by default those of the paper")
    parser.add_argument("--rank", type=int, nargs="+", help="by default one of the first, a middle and the last stage")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--stages", type=int, default=1, help="on each rank")
    parser.add_argument("--microbatches", type=int, help="by default twice as many as pipeline stages")
    parser.add_argument("--length", type=int, default=4096, help="of rows")
    parser.add_argument("--exchange", choices=EXCHANGES, default="auto")
    parser.add_argument("--recompute", choices=("selective", "full"))
    parser.add_argument("--brief", action="store_true")
    arguments = parser.parse_args()
    right = True
    for world in arguments.gpus:
        for name in arguments.model:
            config = replace(MODELS[name], output_router_logits=True, router_aux_loss_coef=0.01)
            for text in arguments.fold or FOLDS.get(name, ()):
                fold = Fold.parse(text, world)
                for rank in arguments.rank or typical(fold):
                    right &= work(name, config, fold, rank, arguments)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
