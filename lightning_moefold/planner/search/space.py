# SPDX-License-Identifier: Apache-2.0
"""What a search may choose from: settings, micro-batch sizes and folds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd

from lightning_moefold.errors import PlanError
from lightning_moefold.fold import Fold, divisors
from lightning_moefold.modules.recompute_parts import parse_recompute
from lightning_moefold.parallel.pipeline.plan import SCHEDULES
from lightning_moefold.planner.search.job import DISPATCHERS, OFFLOADS, RECOMPUTES, SHARDINGS, Job


@dataclass(frozen=True)
class Space:
    """The settings from which the search may choose.

    Args:
        micro_batch_sizes: Sequences per micro-batch to try; None for the powers of two up to ``largest_micro_batch``.
        schedules: Pipeline schedules to try.
        recomputes: Recomputation settings to try, the fastest first; see :class:`Plan`.
        dispatchers: Token dispatchers to try.
        largest_micro_batch: Largest micro-batch size tried if ``micro_batch_sizes`` is None.
        num_microbatches: Number of micro-batches per step of a pipeline; None for any.
        accumulates: Whether batches may be accumulated if there is no pipeline; otherwise a rank computes its share at
            once.
        num_stages_per_rank: Number of stages per rank in interleaved schedules; None for any that divides the layers.
        data_parallel_size: Required dp of the folds; None for any.
        shardings: Data-parallel shardings to try; empty for that of the job.
        offloads: What to keep in host memory, to try; None for nothing, or whatever makes a plan fit if none does
            (:mod:`.robust`).
    """

    micro_batch_sizes: tuple[int, ...] | None = None
    schedules: tuple[str, ...] = tuple(s for s in SCHEDULES if s != "gpipe")
    recomputes: tuple[str, ...] = RECOMPUTES
    dispatchers: tuple[str, ...] = ("alltoall",)
    largest_micro_batch: int = 16
    num_microbatches: int | None = None
    accumulates: bool = True
    num_stages_per_rank: int | None = None
    data_parallel_size: int | None = None
    shardings: tuple[str, ...] = ()
    offloads: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, values, known in (
            ("schedule", self.schedules, SCHEDULES), ("dispatcher", self.dispatchers, DISPATCHERS),
            ("sharding", self.shardings, SHARDINGS), ("offload", self.offloads or (), OFFLOADS),
        ):  # fmt: skip
            for value in values:
                if value not in known:
                    raise PlanError(f"{name}={value!r} is not known; use one of {', '.join(known)}.")
        for recompute in self.recomputes:
            parse_recompute(recompute)


def micro_batches(job: Job, space: Space, fold: Fold) -> list[int]:
    """Returns the micro-batch sizes to try under ``fold``.

    If neither sizes nor their number is given, they are the powers of two that divide a rank's share of the batch.
    """
    share = job.global_batch_size // fold.dp
    if fold.pp == 1 and not space.accumulates:
        return [share] if share >= (space.num_microbatches or 1) else []
    if fold.pp > 1 and space.num_microbatches is not None:
        return [] if share % space.num_microbatches else [share // space.num_microbatches]
    sizes = space.micro_batch_sizes or [2**i for i in range(space.largest_micro_batch.bit_length())]
    return [size for size in sizes if share % size == 0]


def legal_folds(job: Job, space: Space | None = None) -> Iterator[Fold]:
    """Yields every fold of ``Fold.enumerate`` whose data-parallel size divides the batch, in order of pp.

    It applies the same rules as lists of divisors, because enumerating first and refusing later takes seconds for
    16,384 ranks.
    """
    model, world, only = job.model, job.world_size, space.data_parallel_size if space else None
    dense, expert = gcd(0, *model.dense_widths.values()), gcd(0, *model.expert_widths.values())
    for pp in divisors(world):
        if pp > model.num_hidden_layers:
            break
        stage = world // pp
        sizes = divisors(stage)
        tps = [n for n in sizes if n <= model.num_attention_heads and dense % n == 0]
        attention = [
            (tp, cp) for tp in tps for cp in divisors(stage // tp)
            if job.global_batch_size % (stage // (tp * cp)) == 0 and tp * cp <= job.sequence_length
            and only in (None, stage // (tp * cp))
        ]  # fmt: skip
        eps = [n for n in sizes if model.num_experts % n == 0]
        moe = [(ep, etp) for ep in eps for etp in sizes if stage % (ep * etp) == 0 and expert % etp == 0]
        for (tp, cp), (ep, etp) in product(attention, moe):
            yield Fold(world, tp, cp, pp, ep, etp)
