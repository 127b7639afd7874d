# SPDX-License-Identifier: Apache-2.0
"""How long pipeline ranks wait: measured under torch's schedules, beside the closed form and the planner's simulation.

    python benchmarks/bubble.py [--ranks 2 4] [--schedule zbv ...] [--microbatches 8] [--unit-ms 40] [--output DIR]

A small MoECausalLM runs the real pipeline on gloo ranks. So that ranks may share cores, each rank's layers *sleep* on top of
their (small) work: together one unit for a micro-batch in forward, one in backward for the gradient of the input, one for
those of the weights; a schedule with two stages a rank has two stages of half a unit. Busy is the time inside the passes
of a stage, idle the rest from the first pass to the end of the last, on the median of three steps (by their length). With
``--output``, each timeline is written as a Chrome trace and as a picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import leave, machine, run_worker
from torch import Tensor, nn

from lightning_moefold import Fold, MoECausalLM, MoEConfig
from lightning_moefold.callbacks.timeline import TimelineRecorder
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import PipelinePlan, Settings, Sharding, parallelize
from lightning_moefold.parallel.pipeline.pipeline import Pipeline
from lightning_moefold.parallel.pipeline.plan import SPLIT_BACKWARD
from lightning_moefold.planner.cost.schedules import bubble
from lightning_moefold.planner.cost.simulate import Op, Timeline, chrome_trace, run_fixed, run_split
from lightning_moefold.plots.style import save_figure
from lightning_moefold.plots.timeline import draw, idle_shares

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv": 2, "dualpipev": 2}


class Sleep(torch.autograd.Function):
    """The identity, which takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return grads[0], None, None


def slow_down(layer: nn.Module, unit: float) -> None:
    """Lets a layer sleep: once each in forward, on the way to its input's gradient, and to that of a weight."""
    plain = layer.forward
    # A weight of its own: torch frees the graph of each group of weights that share a way.
    layer.bias = nn.Parameter(torch.zeros(()))

    def forward(hidden: Tensor, batch: Any) -> Tensor:
        return Sleep.apply(plain(hidden, batch), unit, unit) + Sleep.apply(layer.bias, 0.0, unit)

    layer.forward = forward


def work(arguments: argparse.Namespace) -> None:
    """Runs one schedule on this rank; rank zero prints its timeline."""
    dist.init_process_group("gloo")
    world, chunks = dist.get_world_size(), CHUNKS[arguments.case]
    fold = Fold.parse(f"pp{world}", world)
    mesh = FoldedMesh(fold, "cpu")
    config = MoEConfig(
        model_type="mixtral", vocab_size=64, hidden_size=16, num_hidden_layers=world * chunks, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=0, moe_intermediate_size=16, num_experts=2,
        shared_expert_intermediate_size=0, num_experts_per_tok=1, norm_topk_prob=True, router_aux_loss_coef=0.0,
    )  # fmt: skip
    with deferred_weights():
        model = MoECausalLM.from_config(config)
    split = (1,) * (world * chunks)
    settings = Settings(Sharding("none"), PipelinePlan(arguments.case, chunks, split), arguments.microbatches)
    parallelize(model, mesh, settings, torch.device("cpu"))
    assert isinstance(model.pipeline, Pipeline)
    for layer in model.model.layers.values():
        slow_down(layer, arguments.unit_ms / 1e3 / chunks)
    ids = torch.arange(8).repeat(arguments.microbatches, 1)
    recorder, steps = TimelineRecorder(model.pipeline.runner), []
    for step in range(4):
        if step:
            recorder.start()
        model(input_ids=ids, labels=ids).loss.backward()
        if step:
            steps.append(recorder.finish())
    timeline = sorted(steps, key=lambda t: t.seconds)[1]
    if dist.get_rank() == 0:
        Path(arguments.trace).write_text(chrome_trace(timeline))
    leave()


def run(schedule: str, world: int, arguments: argparse.Namespace, trace: Path) -> Timeline:
    from lightning_moefold.plots.read import read_timeline

    words = ["--case", schedule, "--microbatches", str(arguments.microbatches), "--unit-ms", str(arguments.unit_ms),
             "--trace", str(trace)]  # fmt: skip
    run_worker("bubble.py", words, ranks=world, threads=1)
    return read_timeline(trace)


def closed_form(schedule: str, world: int, microbatches: int) -> float:
    """Idle share by the formulas of the planner, for F = 1, B = 2 of which W = 1."""
    waits = bubble(schedule, CHUNKS[schedule], [1.0] * world, [2.0] * world, [1.0] * world)
    return waits / (microbatches * 3 + waits)


def simulated(schedule: str, world: int, microbatches: int) -> float:
    """Idle share of the planner's discrete-event simulation."""
    split, chunks = schedule in SPLIT_BACKWARD, CHUNKS[schedule]

    def duration(op: Op) -> float:
        return {"F": 1.0, "B": 1.0 if split else 2.0, "W": 1.0}[op[0]] / chunks

    return (run_split if split else run_fixed)(schedule, world, chunks, microbatches, duration).idle_fraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--schedule", nargs="+", choices=CHUNKS, default=list(CHUNKS))
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--unit-ms", type=float, default=40.0)
    parser.add_argument("--output", type=Path, default=Path("/tmp/bubble"))
    for hidden in ("case", "trace"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        work(arguments)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    m, unit = arguments.microbatches, arguments.unit_ms / 1e3
    print(f"{m} micro-batches, {arguments.unit_ms:.0f} ms each of forward, input and weight gradients per rank, "
          f"{machine()}\n")  # fmt: skip
    print("| ranks | schedule | step, units | idle | of each rank | closed form | simulated | work / ideal |")
    print("|--:|---|--:|--:|---|--:|--:|--:|")
    for world in arguments.ranks:
        for schedule in arguments.schedule:
            stem = arguments.output / f"{schedule}-{world}"
            timeline = run(schedule, world, arguments, stem.with_suffix(".json"))
            save_figure(draw(timeline, f"{schedule}, {world} ranks, {m} micro-batches"), stem.with_suffix(".png"))
            shares = idle_shares(timeline)
            busy = sum(e.end - e.start for e in timeline.events) / (world * 3 * m * unit)
            print(f"| {world} | {schedule} | {timeline.seconds / unit:.1f} | {sum(shares) / world:.1%} | "
                  f"{' '.join(f'{share:.1%}' for share in shares)} | {closed_form(schedule, world, m):.1%} | "
                  f"{simulated(schedule, world, m):.1%} | {busy:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
