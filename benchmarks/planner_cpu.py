# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured step times of real training steps on CPU ranks, under every fold of the strategy.

Calibrates the machine with as many ranks, then runs every fold in turn, and all of them again as often as asked, so that
a busy minute does not meet one fold alone. A fold's time is its least disturbed round. Best on a machine that does
nothing else; elsewhere in pieces, each of which adds to the file:

    python benchmarks/planner_cpu.py --ranks 4 --minutes 7 --file steps.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_moefold import Fold, MoECausalLM, MoEConfig
from lightning_moefold.errors import FoldError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import Settings, parallelize
from lightning_moefold.planner import CostModel, Hardware, Job, Plan
from lightning_moefold.planner.machine.calibrate import calibrate
from lightning_moefold.testing import RankPool

CONFIG = MoEConfig(
    model_type="mixtral", vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, intermediate_size=0, moe_intermediate_size=512,
    shared_expert_intermediate_size=0, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
    router_aux_loss_coef=0.0,
)  # fmt: skip
BATCH, LENGTH, MICRO = 16, 128, 4


def plan_of(fold: Fold) -> Plan:
    """One call of the model: the batch at once, or four micro-batches through a pipeline."""
    return Plan(fold, BATCH // fold.dp // (MICRO if fold.pp > 1 else 1))


def measure_step(text: str, ranks: int, steps: int) -> float:
    """Seconds of a step under a fold, on one rank of the pool: the lower quartile."""
    fold = Fold.parse(text, ranks)
    mesh = FoldedMesh(fold, "cpu")
    with deferred_weights():
        model = MoECausalLM.from_config(CONFIG)
    parallelize(model, mesh, Settings(num_microbatches=MICRO if fold.pp > 1 else 1), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    generator = torch.Generator().manual_seed(mesh.place["dp"])
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH // fold.dp, LENGTH), generator=generator)
    times = []
    for _ in range(steps + 2):
        dist.barrier()
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[steps // 4]


def folds(ranks: int) -> list[Fold]:
    """Those that suit model and batch."""
    found = []
    for fold in Fold.enumerate(ranks):
        try:
            fold.validate(CONFIG)
        except FoldError:
            continue
        if BATCH % (fold.dp * (MICRO if fold.pp > 1 else 1)) == 0 and fold.pp <= MICRO:
            found.append(fold)
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    places = [[sorted(values).index(v) for v in values] for values in (a, b)]
    return statistics.correlation(*places)


def report(seconds: dict[str, list[float]], machine: Hardware, ranks: int) -> None:
    """Prints every fold, and how far the predictions are."""
    job = Job(CONFIG, ranks, machine, BATCH, LENGTH, "32-true")
    costs = CostModel(job)
    rows = []
    for text, rounds in seconds.items():
        estimate = costs.estimate(plan_of(Fold.parse(text, ranks)))
        rows.append((min(rounds), estimate.step_time, max(rounds) / min(rounds), text, estimate.bounds))
    print(f"{'measured':>11}{'predicted':>11}{'ratio':>7}{'spread':>8}  fold")
    for measured, predicted, spread, text, bounds in sorted(rows):
        kinds = ", ".join(f"{kind} {s / predicted:.0%}" for kind, s in list(bounds.items())[:3])
        print(
            f"{measured * 1e3:8.1f} ms{predicted * 1e3:8.1f} ms{predicted / measured:7.2f}{spread:8.2f}  {text:40} {kinds}"
        )
    ratios = [row[1] / row[0] for row in rows]
    scale = statistics.geometric_mean(ratios)
    mean, shape = (statistics.fmean(abs(r / s - 1) for r in ratios) for s in (1.0, scale))
    best = min(rows, key=lambda row: row[1])
    print(f"{len(rows)} folds: mean error {mean:.0%}, {shape:.0%} after a common factor of {scale:.2f}")
    print(f"rank correlation {rank_correlation([row[1] for row in rows], [row[0] for row in rows]):.2f}")
    print(
        f"the fold predicted to be fastest is {best[0] / min(row[0] for row in rows):.2f} times the fastest one measured"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="measured at a time under each fold")
    parser.add_argument("--rounds", type=int, default=3, help="times that each fold is to have been measured")
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop, to go on another time")
    parser.add_argument(
        "--file", type=Path, default=Path("planner_cpu.json"), help="measurements so far (default: here)"
    )
    arguments = parser.parse_args()
    ranks, file, ends = arguments.ranks, arguments.file, time.monotonic() + 60 * arguments.minutes
    seen = json.loads(file.read_text()) if file.exists() else {"machines": [], "seconds": {}}
    seconds: dict[str, list[float]] = seen["seconds"]
    machine, _ = calibrate(ranks, "here", use_gpu=False)
    seen["machines"].append(machine.to_toml())
    file.write_text(json.dumps(seen))
    with RankPool(ranks) as pool:
        every = [str(fold) for fold in folds(ranks)]
        while time.monotonic() < ends:
            text = min(every, key=lambda text: len(seconds.get(text, ())))
            if len(seconds.get(text, ())) >= arguments.rounds:
                break
            step = max(pool.run(measure_step, text, ranks, arguments.steps, ranks=ranks))
            seconds.setdefault(text, []).append(step)
            file.write_text(json.dumps(seen))
            print(f"{step * 1e3:8.1f} ms  {text}", flush=True)
    machines = []
    for text in seen["machines"]:
        file.with_suffix(".toml").write_text(text)
        machines.append(Hardware.from_toml(file.with_suffix(".toml")))
    report(seconds, max(machines, key=lambda m: m.peak("fp32")), ranks)


if __name__ == "__main__":
    # The ranks import this file by name, which they cannot do with __main__.
    from planner_cpu import main as run

    run()
