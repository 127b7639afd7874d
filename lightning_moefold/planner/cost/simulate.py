# SPDX-License-Identifier: Apache-2.0
"""A discrete-event simulator of pipeline schedules, and its Chrome trace. numpy only.

A *virtual stage* s is a model chunk: with p ranks and v chunks per rank there are p * v of them. The forward of (s, j)
waits for the forward of (s - 1, j), its backward for the backward of (s + 1, j), and the last stage's backward for its
own forward; a message between
ranks takes ``latency``. GPipe, 1F1B and interleaved 1F1B run in their fixed order; schedules that split backward are
list-scheduled: a free rank runs input gradients first, then forwards while activations are below the schedule's limit,
and fills the remaining time with weight gradients.

For equal stages without latency, the makespan of the fixed orders equals the closed form of ``schedules.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_moefold.parallel.pipeline.plan import stage_owner
from lightning_moefold.planner.cost.cost import CostModel, RankTimes
from lightning_moefold.planner.cost.schedules import RankLayers, chunks_in_flight, stage_layers
from lightning_moefold.planner.machine.links import axis_shape
from lightning_moefold.planner.search.job import SPLIT_BACKWARD, Job, Plan

#: An operation: kind (F, B or W), virtual stage, micro-batch.
Op = tuple[str, int, int]
#: Function that returns the seconds of an operation.
Durations = Callable[[Op], float]


@dataclass(frozen=True)
class Event:
    """An operation on a rank; times are in seconds from the start."""

    rank: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The operations of a step with their times.

    Args:
        events: The operations in the order in which they were placed.
        ranks: Number of pipeline ranks.
    """

    events: tuple[Event, ...]
    ranks: int

    @property
    def seconds(self) -> float:
        """Time at which the last operation ends, in seconds."""
        return max((event.end for event in self.events), default=0.0)

    @property
    def idle_fraction(self) -> float:
        """Share of the time that ranks wait, averaged over ranks."""
        busy = sum(self.busy(rank) for rank in range(self.ranks))
        return 1 - busy / (self.seconds * self.ranks) if self.events else 0.0

    def busy(self, rank: int) -> float:
        """Returns the seconds in which at least one operation of a rank runs; the two of a pair take turns."""
        found = until = 0.0
        for event in sorted((e for e in self.events if e.rank == rank), key=lambda e: e.start):
            found += max(0.0, event.end - max(event.start, until))
            until = max(event.end, until)
        return found


# ---- fixed orders ----------------------------------------------------------------------------------------------------


def fixed_order(schedule: str, pp: int, chunks: int, microbatches: int, rank: int) -> list[Op]:
    """Returns the operations of a rank under GPipe, 1F1B or interleaved 1F1B; backward is one operation."""
    total = microbatches * chunks
    forwards = [_place("F", k, pp, chunks, rank) for k in range(total)]
    backwards = [_place("B", k, pp, chunks, rank) for k in range(total)]
    if schedule == "gpipe":
        return forwards + backwards
    warm_up = pp - rank - 1 if chunks == 1 else 2 * (pp - rank - 1) + (chunks - 1) * pp
    warm_up = min(warm_up, total)
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[total - warm_up :]


def _place(kind: str, step: int, pp: int, chunks: int, rank: int) -> Op:
    """Returns the step-th forward or backward of a rank: groups of pp micro-batches pass through all chunks in turn."""
    if chunks == 1:
        return kind, rank, step
    turn, place = divmod(step, pp * chunks)
    chunk = place // pp
    if kind == "B":
        chunk = chunks - 1 - chunk
    return kind, chunk * pp + rank, turn * pp + place % pp


def _needs(op: Op, last: int) -> Op | None:
    kind, stage, microbatch = op
    if kind == "F":
        return ("F", stage - 1, microbatch) if stage else None
    if kind == "B":
        return ("B", stage + 1, microbatch) if stage < last else ("F", stage, microbatch)
    return "B", stage, microbatch


def run_fixed(
    schedule: str, pp: int, chunks: int, microbatches: int, duration: Durations, latency: float = 0.0
) -> Timeline:
    """Runs a schedule of fixed order."""
    queues = [fixed_order(schedule, pp, chunks, microbatches, rank) for rank in range(pp)]
    owner = {stage: stage_owner(stage, pp, schedule) for stage in range(pp * chunks)}
    done: dict[Op, float] = {}
    free, position, events = [0.0] * pp, [0] * pp, []
    waiting = True
    while waiting:
        waiting = False
        for rank in range(pp):
            while position[rank] < len(queues[rank]):
                op = queues[rank][position[rank]]
                need = _needs(op, pp * chunks - 1)
                if need is not None and need not in done:
                    break
                ready = 0.0 if need is None else done[need] + latency * (owner[need[1]] != rank)
                start = max(free[rank], ready)
                done[op] = free[rank] = start + duration(op)
                events.append(Event(rank, op, start, done[op]))
                position[rank] += 1
                waiting = True
    if any(position[rank] < len(queues[rank]) for rank in range(pp)):
        raise RuntimeError(
            f"schedule {schedule} of {pp} ranks, {chunks} chunks, {microbatches} micro-batches is stuck."
        )
    return Timeline(tuple(events), pp)


# ---- list scheduling -------------------------------------------------------------------------------------------------


class _ListScheduler:
    """Runs schedules that split backward; each rank chooses its next operation when it is free."""

    def __init__(
        self, schedule: str, pp: int, chunks: int, microbatches: int, duration: Durations, latency: float
    ) -> None:
        self.pp, self.last, self.duration, self.latency = pp, pp * chunks - 1, duration, latency
        self.owner = [stage_owner(stage, pp, schedule) for stage in range(pp * chunks)]
        self.limit = [int(chunks_in_flight(schedule, pp, chunks, microbatches, rank)) for rank in range(pp)]
        self.held, self.free = [0] * pp, [0.0] * pp
        self.ready: list[dict[Op, float]] = [{} for _ in range(pp)]
        self.events: list[Event] = []
        for microbatch in range(microbatches):
            self.ready[0][("F", 0, microbatch)] = 0.0

    def run(self) -> Timeline:
        """Places operations until none is left, always the one that can start first."""
        while any(self.ready):
            start, rank, op = min(self._next(rank) for rank in range(self.pp) if self.ready[rank])
            self._place(rank, op, start)
        return Timeline(tuple(self.events), self.pp)

    def _next(self, rank: int) -> tuple[float, int, Op]:
        # Forwards of later chunks always may start, those of the first chunk while activations are below the limit.
        room = self.held[rank] < self.limit[rank]
        allowed = {op: at for op, at in self.ready[rank].items() if op[0] != "F" or op[1] >= self.pp or room}
        if not allowed:
            allowed = self.ready[rank]  # the limit would block forever, so it is ignored for the earliest forward
        start = max(self.free[rank], min(allowed.values()))
        now = [op for op, at in allowed.items() if at <= start]
        return start, rank, min(now, key=self._urgency)

    @staticmethod
    def _urgency(op: Op) -> tuple[int, int, int]:
        kind, stage, microbatch = op
        return {"B": 0, "F": 1, "W": 2}[kind], microbatch, -stage

    def _place(self, rank: int, op: Op, start: float) -> None:
        kind, stage, microbatch = op
        end = start + self.duration(op)
        del self.ready[rank][op]
        self.free[rank] = end
        self.events.append(Event(rank, op, start, end))
        if kind == "F":
            self.held[rank] += 1
            self._release(("B", stage, microbatch) if stage == self.last else ("F", stage + 1, microbatch), end, rank)
        elif kind == "B":
            self.held[rank] -= 1
            self._release(("W", stage, microbatch), end, rank)
            if stage:
                self._release(("B", stage - 1, microbatch), end, rank)

    def _release(self, op: Op, end: float, sender: int) -> None:
        receiver = self.owner[op[1]]
        self.ready[receiver][op] = end + self.latency * (receiver != sender)


def run_split(
    schedule: str, pp: int, chunks: int, microbatches: int, duration: Durations, latency: float = 0.0
) -> Timeline:
    """Runs a schedule that computes input gradients (B) and weight gradients (W) separately."""
    return _ListScheduler(schedule, pp, chunks, microbatches, duration, latency).run()


# ---- plans -----------------------------------------------------------------------------------------------------------


def simulate(job: Job, plan: Plan, seed: int = 0) -> Timeline:
    """Runs the pipeline of a plan; the load of each micro-batch is drawn from the routing profile.

    Args:
        job: The training job.
        plan: The plan to simulate.
        seed: Seed of the loads.
    """
    costs, fold = CostModel(job), plan.fold
    chunks, microbatches = plan.num_stages_per_rank, plan.num_microbatches(job)
    stages = _stages(costs, plan)
    shape = axis_shape(fold, "pp", job.hardware.gpus_per_node)
    tokens = costs.layers.tokens(plan.micro_batch_size, fold.cp) / fold.tp
    latency = costs.layers.links.neighbour(shape, tokens * job.model.hidden_size * job.activation_bytes)
    split = plan.schedule in SPLIT_BACKWARD and fold.pp > 1
    loads = _loads(job, plan, costs.layers.load(fold.ep, fold.tp * fold.cp), len(stages), microbatches, seed)

    def duration(op: Op) -> float:
        kind, stage, microbatch = op
        times, load = stages[stage], loads[stage, microbatch]
        if kind == "F":
            return times.forward + (load - 1) * _by_rows(times, "forward")
        weight = times.block.weight if split else 0.0
        if kind == "W":
            return weight * load
        return times.backward + (load - 1) * _by_rows(times, "backward") - weight * load

    run = run_split if split else run_fixed
    return run(plan.schedule, fold.pp, chunks, microbatches, duration, latency)


def _stages(costs: CostModel, plan: Plan) -> list[RankTimes]:
    model, fold = costs.job.model, plan.fold
    cut: tuple[range, ...] = (range(model.num_hidden_layers),)
    if fold.pp > 1:
        cut = stage_layers(model, fold.pp, plan.num_stages_per_rank, plan.schedule)
    stages = []
    for stage, layers in enumerate(cut):
        moe = sum(map(model.is_moe_layer, layers))
        stages.append(costs.chunk(plan, RankLayers(moe, len(layers) - moe, stage == 0, stage == len(cut) - 1)))
    return stages


def _by_rows(times: RankTimes, way: str) -> float:
    """Returns the seconds that grow in proportion to the busiest rank's rows: expert products, exchange, etp collectives."""
    seconds = getattr(times.block, way)
    return sum(seconds.get(part, 0.0) for part in ("experts", "a2a", "etp"))


def _loads(job: Job, plan: Plan, mean: float, stages: int, microbatches: int, seed: int) -> np.ndarray:
    """Returns the busiest rank's load for every stage and micro-batch, relative to the cost model's mean."""
    model, ep = job.model, plan.fold.ep
    if job.pad_to_capacity:
        return np.ones((stages, microbatches))
    relative = job.routing.expert_shares(model.num_experts, model.num_experts_per_tok) * model.num_experts
    if job.capacity_factor is not None:
        relative = np.minimum(relative, job.capacity_factor)
    layers = relative.reshape(len(relative), ep, -1).mean(2).max(1) / mean
    random = np.random.default_rng(seed)
    per_stage = max(model.num_hidden_layers // stages, 1)
    return layers[random.integers(len(layers), size=(stages, microbatches, per_stage))].mean(2)


def chrome_trace(timeline: Timeline) -> str:
    """Returns events as JSON for ``chrome://tracing`` or Perfetto, one row per pipeline rank; times in microseconds."""
    colours = {"F": "good", "B": "bad", "W": "yellow"}
    events = [
        {
            "name": f"{e.op[0]}{e.op[2]}", "cat": e.op[0], "ph": "X",
            "ts": e.start * 1e6, "dur": (e.end - e.start) * 1e6,
            "pid": 0, "tid": e.rank, "cname": colours[e.op[0]], "args": {"stage": e.op[1], "micro-batch": e.op[2]},
        }
        for e in timeline.events
    ]  # fmt: skip
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in range(timeline.ranks)
    ]
    return json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"})
