# SPDX-License-Identifier: Apache-2.0
"""Which layers a pipeline stage holds, and which rank holds the stage. Pure Python.

A pipeline of pp ranks has ``pp * v`` stages, v of them on each rank:

    looped (gpipe, 1f1b, interleaved)     rank r holds stages r, r + pp, r + 2 pp, ...
    V-shaped (zbv, dualpipev), v = 2      rank r holds stages r and 2 pp - 1 - r

Layers are cut so that the slowest stage is as fast as can be. A layer costs the multiplications of one token, hence the
parameters that a token meets: all of a dense layer, the chosen experts of an MoE layer; the head costs its matrix, and
looking up an embedding next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lightning_moefold.arguments import check_count
from lightning_moefold.errors import InputError
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.recompute_parts import Recompute

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
#: V-shaped: two stages on each rank, the second ones in reverse order.
V_SHAPED = ("zbv", "dualpipev")
#: Backward in two parts, so that gradients of weights fill the gaps.
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")


@dataclass(frozen=True)
class PipelinePlan:
    """How a model is cut into stages and in what order they work.

    Args:
        schedule: One of :data:`SCHEDULES`.
        stages_per_rank: v; V-shaped schedules always have two.
        split: Number of layers of each stage; None to cut by cost.

    Raises:
        ValueError: For a schedule that is not known, or numbers that cannot be.
    """

    schedule: str = "1f1b"
    stages_per_rank: int = 1
    split: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"pipeline_schedule={self.schedule!r} is not known; use {' or '.join(map(repr, SCHEDULES))}."
            )
        if self.split is not None and not self.split:
            raise InputError("pipeline_split=[] names no stage; give one number of layers for each, or None.")
        for layers in self.split or ():
            check_count("pipeline_split", layers, least=0)
        check_count("num_stages_per_rank", self.stages_per_rank)
        if self.split is not None and 0 in self.split:
            raise InputError(f"pipeline_split={list(self.split)} has a stage without layers; give each at least one.")
        v = self.stages_per_rank
        looped = self.schedule.startswith("interleaved")
        if v < 1 or (looped and v < 2) or (self.schedule in V_SHAPED and v > 2):
            legal = "2 or more" if looped else "2" if self.schedule in V_SHAPED else "1 or more"
            raise InputError(f"num_stages_per_rank={v} does not go with {self.schedule!r}; use {legal}.")
        if self.schedule in ("gpipe", "1f1b") and v > 1:
            raise InputError(
                f"num_stages_per_rank={v} does not go with {self.schedule!r}, which has one stage a rank; use 'interleaved_1f1b'."
            )

    @property
    def chunks(self) -> int:
        """Stages on each rank, v."""
        return 2 if self.schedule in V_SHAPED else self.stages_per_rank

    def least_microbatches(self, pp: int) -> int:
        """Returns the smallest number of micro-batches with which ``pp`` ranks can run the schedule."""
        return {"1f1b": pp, "dualpipev": 2 * pp}.get(self.schedule, 1)

    def needs_microbatches(self, pp: int) -> InputError:
        """Returns the error for a pipeline whose number of micro-batches is not given."""
        return InputError(
            f"pipeline_parallel_size={pp} needs num_microbatches; {self.schedule!r} runs with {self.least_microbatches(pp)} or "
            f"more, and {2 * pp} or more keep ranks busy."
        )

    def check(self, pp: int, num_microbatches: int, sharding: str, recompute: Recompute | None = None) -> None:
        """Raises unless ``pp`` ranks can run the schedule.

        Raises:
            ValueError: Naming the rule and what to use.
        """
        if pp == 1:
            return
        m, name = num_microbatches, self.schedule
        if self.split is not None and len(self.split) != pp * self.chunks:
            raise InputError(
                f"pipeline_split={list(self.split)} names {len(self.split)} stages, but there are {pp * self.chunks} "
                f"(pipeline_parallel_size={pp} x {self.chunks} a rank); give one number of layers for each."
            )
        least = self.least_microbatches(pp)
        if m < least:
            raise InputError(
                f"num_microbatches={m} is too few for {name!r} with pipeline_parallel_size={pp}; use at least {least}"
                + (", or 'gpipe'." if name == "1f1b" else ".")
            )
        if name.startswith("interleaved") and m % max(1, m // pp):
            raise InputError(
                f"num_microbatches={m} does not go with {name!r} and pipeline_parallel_size={pp}, which deal them in equal "
                f"groups; use a multiple of {pp}."
            )
        if name in SPLIT_BACKWARD and sharding == "full":
            raise InputError(
                f"pipeline_schedule={name!r} splits backward and needs the weights gathered until its end, so it does not go "
                "with data_parallel_sharding='full'; use data_parallel_sharding='optimizer', or 'interleaved_1f1b'."
            )

        if name in SPLIT_BACKWARD and recompute is not None:
            raise InputError(
                f"pipeline_schedule={name!r} splits backward, and each part would compute again what recompute={recompute!r} has "
                "dropped; use recompute=None, or 'interleaved_1f1b'."
            )

    def owner(self, stage: int, pp: int) -> int:
        """The pipeline rank of a stage."""
        return stage_owner(stage, pp, self.schedule)

    def places_like(self, other: PipelinePlan, pp: int) -> bool:
        """Whether another plan has as many stages, on the same ranks."""
        stages = range(pp * self.chunks)
        return self.chunks == other.chunks and all(self.owner(s, pp) == other.owner(s, pp) for s in stages)

    def local_stages(self, pp: int, rank: int) -> list[int]:
        """The stages of a pipeline rank, in the order of the model."""
        return [stage for stage in range(pp * self.chunks) if self.owner(stage, pp) == rank]

    def layers(self, config: MoEConfig, pp: int) -> list[range]:
        """The layers of every stage of a language model; see :meth:`cut`."""
        costs = [float(config.layer_parameters(i, active=True)) for i in range(config.num_hidden_layers)]
        return self.cut(costs, pp, "num_hidden_layers", head=float(config.vocab_size * config.hidden_size))

    def cut(self, costs: Sequence[float], pp: int, name: str, head: float = 0.0) -> list[range]:
        """The layers of every stage.

        Args:
            costs: Of each layer.
            pp: Pipeline ranks.
            name: What the number of layers is called.
            head: What the last stage does besides its layers.

        Raises:
            ValueError: If there are fewer layers than stages, or the numbers given do not add up.
        """
        stages, total = pp * self.chunks, len(costs)
        if stages > total:
            raise InputError(
                f"{stages} pipeline stages (pipeline_parallel_size={pp} x {self.chunks} a rank) are more than "
                f"{name}={total}, and every stage needs a layer; use fewer."
            )
        if self.split is not None and sum(self.split) != total:
            raise InputError(
                f"pipeline_split={list(self.split)} adds up to {sum(self.split)} layers, but the model has {total}; "
                "make them equal."
            )
        split = self.split or cut_by_cost(costs, stages, head)
        ends = [sum(split[: i + 1]) for i in range(stages)]
        return [range(end - size, end) for end, size in zip(ends, split, strict=True)]


def stage_owner(stage: int, pp: int, schedule: str) -> int:
    """The pipeline rank of a stage: in turns, or there and back for the V-shaped schedules."""
    turn, place = divmod(stage, pp)
    return pp - 1 - place if schedule in V_SHAPED and turn % 2 else place


def cut_by_cost(costs: Sequence[float], stages: int, head: float = 0.0) -> tuple[int, ...]:
    """Numbers of consecutive layers, at least one each, whose largest sum is smallest.

    Args:
        costs: Of each layer.
        stages: Number of pieces.
        head: What the last stage does besides its layers.
    """
    total = len(costs)
    if stages > 1 and len(set(costs)) == 1:
        return _cut_alike(total, stages, costs[0], head)

    @cache
    def best(first: int, pieces: int) -> tuple[float, float, tuple[int, ...]]:
        """Largest sum, sum of squares (among equals, the most even cut) and the cut of the layers from ``first`` on."""
        if pieces == 1:
            cost = sum(costs[first:]) + head
            return cost, cost * cost, (total - first,)
        options = []
        for size in range(1, total - first - pieces + 2):
            cost = sum(costs[first : first + size])
            most, squares, rest = best(first + size, pieces - 1)
            options.append((max(cost, most), squares + cost * cost, (size, *rest)))
        return min(options)

    return best(0, stages)[2]


def _cut_alike(layers: int, stages: int, cost: float, head: float) -> tuple[int, ...]:
    """The same cut where all layers cost the same: only what the last stage takes is open, the others are even."""
    options = []
    for last in range(1, layers - stages + 2):
        size, more = divmod(layers - last, stages - 1)
        split = (*(size + (i >= stages - 1 - more) for i in range(stages - 1)), last)
        sums = [n * cost + head * (i == stages - 1) for i, n in enumerate(split)]
        options.append((max(sums), sum(s * s for s in sums), split))
    return min(options)[2]
