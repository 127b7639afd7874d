# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured step times of real runs on CPU ranks, under every fold that the strategy runs.

Calibrates the machine first, with as many ranks. Run it on a machine that does nothing else:

    python benchmarks/planner_cpu.py --ranks 4
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from lightning_moefold import Fold, MoECausalLM, MoEConfig
from lightning_moefold.calibrate import calibrate
from lightning_moefold.fold import FoldError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import Sharding, parallelize
from lightning_moefold.planner import CostModel, Job, Plan
from lightning_moefold.testing import RankPool

CONFIG = MoEConfig(
    model_type="mixtral", vocab_size=1024, hidden_size=256, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, intermediate_size=0, moe_intermediate_size=512,
    shared_expert_intermediate_size=0, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    router_aux_loss_coef=0.0,
)  # fmt: skip
BATCH, LENGTH = 16, 128


def measure_step(text: str, ranks: int, full: bool, steps: int) -> float:
    """Seconds of a step under a fold, on one rank of the pool."""
    fold = Fold.parse(text, ranks)
    mesh = FoldedMesh(fold, "cpu")
    with deferred_weights():
        model = MoECausalLM.from_config(CONFIG)
    parallelize(model, mesh, Sharding("full" if full else "optimizer"), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    generator = torch.Generator().manual_seed(mesh.place["dp"])
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH // fold.dp, LENGTH), generator=generator)
    times = []
    for _ in range(steps):
        dist.barrier()
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[len(times) // 8]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    places = [[sorted(values).index(v) for v in values] for values in (a, b)]
    return statistics.correlation(*places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    ranks = arguments.ranks
    machine, _ = calibrate(ranks, "here", use_gpu=False)
    measured, predicted = [], []
    with RankPool(ranks) as pool:
        for fold in Fold.enumerate(ranks):
            if fold.pp > 1 or fold.cp > 1 or BATCH % fold.dp:
                continue
            try:
                fold.validate(CONFIG)
            except FoldError:
                continue
            for sharding in ("optimizer", "full"):
                job = Job(CONFIG, ranks, machine, BATCH, LENGTH, "32-true", sharding)
                estimate = CostModel(job).estimate(Plan(fold, BATCH // fold.dp))
                seconds = max(
                    pool.run(measure_step, str(fold), ranks, sharding == "full", arguments.steps, ranks=ranks)
                )
                measured.append(seconds)
                predicted.append(estimate.step_time)
                row = f"{seconds * 1e3:8.1f} ms  {predicted[-1] * 1e3:8.1f} ms  {predicted[-1] / seconds:5.2f}"
                print(f"{fold!s:40} {sharding:10} {row}", flush=True)
    scale = statistics.geometric_mean(p / m for p, m in zip(predicted, measured, strict=True))
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    scaled = [abs(p / m / scale - 1) for p, m in zip(predicted, measured, strict=True)]
    mean, shape = statistics.fmean(errors), statistics.fmean(scaled)
    print(f"{len(measured)} runs: mean error {mean:.0%}, {shape:.0%} after a common factor")
    print(f"common factor {scale:.2f}; rank correlation {rank_correlation(predicted, measured):.2f}")


if __name__ == "__main__":
    # The ranks import this file by name, which they cannot do with __main__.
    from planner_cpu import main as run

    run()
