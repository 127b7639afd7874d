# SPDX-License-Identifier: Apache-2.0
"""The ten published runs that hardware constants are calibrated on: ``python -m lightning_moefold.planner.search.published``.

MoE Parallel Folding (arXiv 2504.14960), tables 1 and 3: DGX H100, bf16, 256 sequences of 4,096 tokens, capacity factor
1.
The paper does not state micro-batch size, schedule and recomputation. Each run gets the best of them, as in ``moefold
plan --fold``, except that the FSDP runs gather weights for every sequence: only that explains their times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from lightning_moefold.fold import Fold
from lightning_moefold.planner.cost.cost import Estimate
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.planner.search.search import Planner
from lightning_moefold.planner.search.space import Space, micro_batches

#: Bytes per logit: bf16 as the product returns it, fp32, and its gradient in fp32.
_LOGIT_BYTES = 2 + 4 + 4


@dataclass(frozen=True)
class PublishedRun:
    """A run of the paper.

    Args:
        model: A known model.
        method: Name of the method in the paper.
        gpus: Number of ranks.
        fold: The mapping; baselines have etp = tp.
        sharding: Data-parallel sharding.
        mfu: Published MFU, 0 to 1.
    """

    model: str
    method: str
    gpus: int
    fold: str
    sharding: str
    mfu: float

    def job(self, hardware: Hardware | None = None) -> Job:
        """Returns the run as a job of the planner."""
        machine = hardware or PRESETS["dgx-h100"]
        return Job(MODELS[self.model], self.gpus, machine, 256, 4096, sharding=self.sharding, capacity_factor=1.0)

    def predict(self, hardware: Hardware | None = None) -> Estimate:
        """Predicts the run, with memory reserved for whole logits.

        Megatron-Core computes the logits of a whole micro-batch at once; this system computes them in chunks. In a
        pipeline nothing is reserved, because logits are on the last stage and the first stage is fuller.
        """
        job, fold, found = self.job(hardware), Fold.parse(self.fold, self.gpus), []
        for size in (1,) if self.sharding == "full" else micro_batches(job, Space(), fold):
            numbers = size * job.sequence_length // fold.cp * ceil(job.model.vocab_size / fold.tp)
            logits = _LOGIT_BYTES * numbers if fold.pp == 1 else 0
            machine = replace(job.hardware, reserved_bytes=job.hardware.reserved_bytes + logits)
            found += Planner(replace(job, hardware=machine), Space(micro_batch_sizes=(size,))).evaluate(fold)
        return min(found, key=lambda estimate: (not estimate.fits, estimate.step_time))


RUNS = (
    PublishedRun("mixtral-8x22b", "FSDP", 128, "tp8 | etp8", "full", 0.043),
    PublishedRun("mixtral-8x22b", "FSDP+EP", 128, "tp2 | etp2 ep8", "full", 0.234),
    PublishedRun("mixtral-8x22b", "TP+EP+DP", 128, "tp4 | etp4 ep8", "optimizer", 0.366),
    PublishedRun("mixtral-8x22b", "MCore", 128, "tp2 pp8 | etp2 ep4", "optimizer", 0.463),
    PublishedRun("mixtral-8x22b", "MCore with folding", 128, "tp2 pp8 | etp1 ep8", "optimizer", 0.493),
    PublishedRun("qwen2-57b-a14b", "FSDP", 64, "tp2 | etp2", "full", 0.099),
    PublishedRun("qwen2-57b-a14b", "FSDP+EP", 64, "tp1 | etp1 ep8", "full", 0.254),
    PublishedRun("qwen2-57b-a14b", "TP+EP+DP", 64, "tp4 | etp4 ep4", "optimizer", 0.231),
    PublishedRun("qwen2-57b-a14b", "MCore", 64, "tp2 pp4 | etp2 ep4", "optimizer", 0.353),
    PublishedRun("qwen2-57b-a14b", "MCore with folding", 64, "tp2 pp4 | etp1 ep4", "optimizer", 0.390),
)


def compare(hardware: Hardware | None = None) -> list[tuple[PublishedRun, Estimate]]:
    """Returns every published run with its prediction."""
    return [(run, run.predict(hardware)) for run in RUNS]


def same_order(pairs: list[tuple[PublishedRun, Estimate]]) -> bool:
    """Whether the methods of each model come in the published order."""
    for model in {run.model for run, _ in pairs}:
        ours = [(run.mfu, estimate.mfu) for run, estimate in pairs if run.model == model]
        if [m for _, m in sorted(ours)] != sorted(m for _, m in ours):
            return False
    return True


def main() -> None:
    """Prints the comparison."""
    pairs = compare()
    print(f"{'model':16}{'method':20}{'published':>10}{'predicted':>10}{'error':>8}  plan")
    for run, estimate in pairs:
        error = (estimate.mfu - run.mfu) / run.mfu
        print(f"{run.model:16}{run.method:20}{run.mfu:10.1%}{estimate.mfu:10.1%}{error:+8.1%}  {estimate.plan}")
    relative = sum(abs(e.mfu / r.mfu - 1) for r, e in pairs) / len(pairs)
    points = sum(abs(e.mfu - r.mfu) for r, e in pairs) / len(pairs)
    print(f"mean absolute error: {points * 100:.2f} points of MFU, {relative:.1%} of MFU")
    print(f"methods in the published order: {'yes' if same_order(pairs) else 'no'}")


if __name__ == "__main__":
    main()
