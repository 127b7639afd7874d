# SPDX-License-Identifier: Apache-2.0
"""Ranks of folds of thousands, on no machine: what they hold, what they send, and what the planner says.

    python benchmarks/scale.py [--gpus 1024 4096] [--model mixtral-8x22b ...] [--fold "tp2 pp8 | ep8"] [--rank 5 ...]

By default the folds of the paper's table of mappings (MoE Parallel Folding, arXiv 2504.14960, table 3) that have a
pipeline, and a rank each of the first, a middle and the last stage. Each rank runs a step of the real code with fake tensors
(``lightning_moefold.testing.scale``): bf16-mixed, AdamW, rows of 4,096 tokens. Bytes are compared with ``layout.py``, every
collective with what the fold requires; the exit status is 0 only if all are as they should be.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lightning_moefold import Fold
from lightning_moefold.models import MoEConfig
from lightning_moefold.parallel import PipelinePlan
from lightning_moefold.planner.hardware import find_hardware
from lightning_moefold.planner.job import Job
from lightning_moefold.planner.layer import LayerCosts
from lightning_moefold.planner.memory import MemoryModel
from lightning_moefold.planner.models_zoo import MODELS
from lightning_moefold.planner.schedules import RankLayers
from lightning_moefold.testing.expected import expected_messages
from lightning_moefold.testing.messages import Expected, Message, as_counter
from lightning_moefold.testing.scale import Rehearsal, Step, rehearse

FOLDS = {
    "mixtral-8x22b": ("tp2 pp8 | ep8", "tp2 pp8 | ep4 etp2"),
    "qwen2-57b-a14b": ("tp2 pp4 | ep4", "tp2 pp4 | ep4 etp2"),
}
LENGTH = 4096


def planned(step: Step, fold: Fold, rank: int) -> tuple[float, float, float]:
    """The planner's bytes of weights (gathered ones included), gradients and moments, for the layers of this rank."""
    config, plan, place = step.config, step.plan, fold.coordinates(rank)["pp"]
    count = fold.pp * plan.chunks
    cut, mine = plan.layers(config, fold.pp), plan.local_stages(fold.pp, place)
    layers = [layer for stage in mine for layer in cut[stage]]
    moe = sum(config.is_moe_layer(layer) for layer in layers)
    held = RankLayers(moe, len(layers) - moe, 0 in mine, count - 1 in mine)
    batch = fold.dp * step.num_microbatches
    job = Job(config, fold.world_size, find_hardware("dgx-h100"), batch, step.sequence_length)
    return MemoryModel(LayerCosts(job)).states(fold, held, step.num_microbatches > 1)


def measured(done: Rehearsal, expected: Sequence[Expected]) -> tuple[float, float, float]:
    """The same as the rank has built and sent them (which includes padding)."""
    gathered, whole = (
        sum(e.message.bytes for e in expected if e.purpose.startswith(what)) for what in ("weights of", "gradients of")
    )
    return done.memory["weights"] + gathered, whole or done.memory["gradients"], done.memory["state"]


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
    step = Step(config, arguments.microbatches or fold.pp, LENGTH, plan)
    done = rehearse(step, fold, rank)
    expected = expected_messages(step, fold, rank, done.model.layouts)
    place = ", ".join(f"{axis} {index}" for axis, index in fold.coordinates(rank).items())
    print(f"\n{name}, {fold.world_size} ranks, `{fold}`, rank {rank} ({place}), {step.num_microbatches} micro-batches")
    print("mesh {mesh:.2f} s, model {build:.1f} s, step {step:.1f} s\n".format(**done.seconds))
    same = done.memory == done.promised
    promise = "as layout.py promises" if same else f"layout.py promises {done.promised}"
    print(", ".join(f"{part} {size / 1e9:.3f} GB" for part, size in done.memory.items()) + f": {promise}")
    pairs = zip(("weights and gathered", "whole gradients", "moments"), measured(done, expected),
                planned(step, fold, rank), strict=True)  # fmt: skip
    print("planner: " + ", ".join(f"{what} {plan / 1e9:.3f} GB ({plan / real - 1:+.2%})" for what, real, plan in pairs))
    print()
    return show(done, expected) and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(FOLDS))
    parser.add_argument("--fold", nargs="+", help="by default those of the paper")
    parser.add_argument("--rank", type=int, nargs="+", help="by default one of the first, a middle and the last stage")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--stages", type=int, default=1, help="on each rank")
    parser.add_argument("--microbatches", type=int, help="by default as many as pipeline stages")
    arguments = parser.parse_args()
    right = True
    for world in arguments.gpus:
        for name in arguments.model:
            config = replace(MODELS[name], output_router_logits=True, router_aux_loss_coef=0.01)
            for text in arguments.fold or FOLDS.get(name, ()):
                for rank in arguments.rank or (5, world // 2 + 5, world - 4):
                    right &= work(name, config, Fold.parse(text, world), rank, arguments)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
