# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of one training step under a plan, by kind of work. Pure Python.

A step is the sum of

- M micro-batches on the slowest pipeline rank (compute, tp, cp, ep, etp), and the exposed part of full sharding's
  weight gathers and gradient scatters in each of them,
- the pipeline bubble, and messages between stages,
- the exposed part of the gradient reduction (overlapped with the last backward) and of the weight gather (overlapped
  with the first forward),
- the optimizer,
- what offloading copies to and from host memory, as far as computation does not hide it (``_offloaded``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_moefold.fold import Fold
from lightning_moefold.modules.recompute_parts import parse_recompute, recompute_parts
from lightning_moefold.planner.cost.layer import Block, LayerCosts, combine, seconds_again
from lightning_moefold.planner.cost.memory import LocalParameters, Memory, MemoryModel
from lightning_moefold.planner.cost.parameters import adapter_parameters
from lightning_moefold.planner.cost.schedules import RankLayers, bubble, pipeline_layout
from lightning_moefold.planner.machine.links import axis_shape
from lightning_moefold.planner.search.job import PRECISIONS, SPLIT_BACKWARD, Job, Plan

#: Names of what can bound a plan, with the kinds of time that belong to each.
BOUNDS: dict[str, tuple[str, ...]] = {
    "compute": ("gemm", "experts", "attention", "head"),
    "memory bandwidth": ("elementwise", "optimizer"),
    "launch": ("launch",),
    "a2a": ("a2a",),
    "etp": ("etp",),
    "tp": ("tp",),
    "cp": ("cp",),
    "pipeline messages": ("p2p",),
    "bubble": ("bubble",),
    "data parallel": ("sharding", "gradients"),
    "recompute": ("recompute",),
    "host link": ("offload",),
}


#: A step under a routing profile for which the memory does not suffice counts as this many.
NO_FIT = 2.0


@dataclass(frozen=True)
class Estimate:
    """Predicted time and memory of a plan.

    Args:
        plan: The plan.
        step_time: Seconds per optimizer step.
        mfu: Model FLOPs over the dense peak of all ranks, 0 to 1.
        times: Seconds by kind of work; their sum is ``step_time``.
        memory: Memory of the fullest rank.
        limit: Bytes that a rank may use.
        microbatches: Number of micro-batches per step and data-parallel rank.
        load: Rows on the busiest expert-parallel rank divided by the mean.
        job: The job that it was predicted for, with its sharding and routing.
        under: The same plan under each routing profile by which a search has ranked it.
    """

    plan: Plan
    step_time: float
    mfu: float
    times: dict[str, float]
    memory: Memory
    limit: float
    microbatches: int
    load: float
    job: Job = field(repr=False)
    under: Mapping[str, Estimate] = field(default_factory=dict, repr=False, compare=False)

    @property
    def score(self) -> float:
        """Mean seconds per step over the routing profiles; those of one under which the plan does not fit count twice."""
        profiles = list(self.under.values()) or [self]
        return sum(e.step_time * (1 if e.fits else NO_FIT) for e in profiles) / len(profiles)

    @property
    def fits(self) -> bool:
        """Whether the plan fits into memory."""
        return self.memory.total <= self.limit

    @property
    def bounds(self) -> dict[str, float]:
        """Returns seconds by kind of bound, largest first."""
        kinds = {kind: sum(self.times.get(part, 0.0) for part in parts) for kind, parts in BOUNDS.items()}
        return dict(sorted(((k, s) for k, s in kinds.items() if s > 0), key=lambda item: -item[1]))

    @property
    def bound_by(self) -> str:
        """The bound that takes most of the time; ``"memory"`` if the plan does not fit."""
        return next(iter(self.bounds)) if self.fits else "memory"

    @property
    def overhead(self) -> str:
        """The kind of time that is largest, apart from the compute that any plan needs."""
        return next((kind for kind in self.bounds if kind != "compute"), "compute")


@dataclass(frozen=True)
class RankTimes:
    """Seconds of a micro-batch on one pipeline rank, forward and backward, by kind of work."""

    block: Block
    recompute: float
    sharding_forward: float
    sharding_backward: float
    offload_forward: float = 0.0
    offload_backward: float = 0.0

    @property
    def forward(self) -> float:
        """Seconds of the forward pass, F."""
        return self.block.forward_total + self.sharding_forward + self.offload_forward

    @property
    def backward(self) -> float:
        """Seconds of the backward pass, B."""
        return self.block.backward_total + self.recompute + self.sharding_backward + self.offload_backward


class CostModel:
    """Predicts step times of a job's plans.

    Args:
        job: The training job: model, machine and batch.
        layers: Layer costs of the same job, which may have another sharding; made if not given.
    """

    def __init__(self, job: Job, layers: LayerCosts | None = None) -> None:
        self.job = job
        self.layers = layers or LayerCosts(job)
        self.memory = MemoryModel(self.layers, job)
        self._links = self.layers.links
        self._cache: dict[tuple[object, ...], RankTimes] = {}

    def estimate(self, plan: Plan, memory: Memory | None = None) -> Estimate:
        """Predicts time and memory of a plan; ``memory`` if that is already known."""
        job, fold = self.job, plan.fold
        microbatches = plan.num_microbatches(job)
        ranks = self.ranks(plan)
        slowest = max(range(fold.pp), key=lambda r: ranks[r].forward + ranks[r].backward)
        rank = ranks[slowest]
        times: dict[str, float] = defaultdict(float)
        self._add_microbatches(times, rank, microbatches)
        if plan.schedule in SPLIT_BACKWARD and fold.pp > 1:
            times["elementwise"] += microbatches * job.hardware.kernels.split_backward * rank.block.backward_total
        if fold.pp > 1:
            times["bubble"] = job.hardware.kernels.waiting * bubble(
                plan.schedule, plan.num_stages_per_rank, [r.forward for r in ranks], [r.backward for r in ranks],
                [r.block.weight for r in ranks],
            )  # fmt: skip
            times["p2p"] = self.messages(plan, microbatches)
        layout = pipeline_layout(job.model, fold.pp, plan.num_stages_per_rank, plan.schedule)
        held = layout[slowest]
        times["gradients"] = self.gradients(fold, held, rank)
        times["optimizer"] = self.optimizer(fold, held)
        if plan.offloads("state"):
            times["offload"] += self._moved_state(plan, held, microbatches * (rank.forward + rank.backward))
        step = sum(times.values())
        mfu = job.model_flops / (step * job.peak_flops * job.world_size)
        memory, load = memory or self.memory.estimate(plan), self.layers.load(fold.ep, fold.tp * fold.cp)
        return Estimate(plan, step, mfu, dict(times), memory, job.hardware.usable_bytes, microbatches, load, job)

    def lower_bound(self, fold: Fold, micro_batch: int, *dispatchers: str) -> float:
        """Returns a lower bound of the step's seconds over all schedules and recomputation settings of this fold.

        It counts only the layers and the head, and divides the layers over stages as evenly as real numbers allow.
        """
        work = self.layers.whole(fold.tp, fold.cp, fold.ep, fold.etp, micro_batch, dispatchers)
        return work / fold.pp * (self.job.global_batch_size // (fold.dp * micro_batch))

    def least_bubble(self, plan: Plan, bound: float) -> float:
        """Returns a lower bound of the seconds that the slowest pipeline rank waits.

        It is that of equal stages: whatever makes a stage slower adds more work to the slowest rank than it takes from the wait.

        Args:
            plan: A plan with any recomputation.
            bound: Result of :meth:`lower_bound` for its fold, micro-batch and dispatcher.
        """
        chunks = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": plan.num_stages_per_rank}.get(plan.schedule)
        if chunks is None:  # gradients of weights may fill the bubble
            return 0.0
        return (
            self.job.hardware.kernels.waiting * bound * (plan.fold.pp - 1) / (plan.num_microbatches(self.job) * chunks)
        )

    # ---- a micro-batch -----------------------------------------------------------------------------------------

    def ranks(self, plan: Plan) -> list[RankTimes]:
        """Returns the times of a micro-batch on each pipeline rank of a plan."""
        layout = pipeline_layout(self.job.model, plan.fold.pp, plan.num_stages_per_rank, plan.schedule)
        return [self.chunk(plan, held) for held in layout]

    def chunk(self, plan: Plan, held: RankLayers) -> RankTimes:
        """Returns the times of a micro-batch in the given layers of the model."""
        key = (
            plan.fold,
            plan.micro_batch_size,
            plan.recompute,
            plan.dispatcher,
            plan.offload,
            plan.num_stages_per_rank,
            held,
        )
        if key not in self._cache:
            self._cache[key] = self._rank_times(plan, held)
        return self._cache[key]

    def _rank_times(self, plan: Plan, held: RankLayers) -> RankTimes:
        fold, size = plan.fold, plan.micro_batch_size
        moe, dense = self.layers.layers(fold.tp, fold.cp, fold.ep, fold.etp, size, plan.dispatcher)
        embedding, head = self.layers.ends(fold.tp, fold.cp, size)
        block = combine([(held.moe, moe), (held.dense, dense), (held.first, embedding), (held.last, head)])
        parts = recompute_parts(parse_recompute(plan.recompute))
        recompute = held.moe * seconds_again(moe, parts, "moe") + held.dense * seconds_again(dense, parts, "mlp")
        there, back = self._offloaded(plan, held, moe, dense, block.forward_total)
        forward = backward = 0.0
        if self.job.sharding == "full":
            gather, scatter = self._sharded_traffic(fold, held)
            forward = self._links.hidden(gather, block.forward_total)
            backward = self._links.hidden(gather + scatter, block.backward_total + recompute)
        return RankTimes(block, recompute, forward, backward, there, back)

    def _offloaded(self, plan: Plan, held: RankLayers, moe: Block, dense: Block, forward: float) -> tuple[float, float]:
        """Returns the exposed seconds, forward and backward, in which a rank's activations of a micro-batch travel.

        A layer's way there hides behind the forward pass of this layer and those after it; its way back, behind the backward
        pass of the layer after it. Nothing hides the way back of a chunk's last layer.

        Args:
            plan: The plan.
            held: The layers.
            moe: A layer with experts.
            dense: A dense layer.
            forward: Seconds of forward of all that the rank holds.
        """
        if not plan.offloads("activations"):
            return 0.0, 0.0
        links, saved = self._links, self.memory.saved(plan)
        layers = [(held.moe, links.to_host(saved[0]), moe), (held.dense, links.to_host(saved[1]), dense)]
        there = links.hidden(sum(number * way for number, way, _ in layers), forward)
        back = plan.num_stages_per_rank * links.to_host(self.memory.largest_layer(held, saved))
        for number, way, layer in layers:
            back += number * links.hidden(way, layer.backward_total)
        return there, back

    def _moved_state(self, plan: Plan, held: RankLayers, window: float) -> float:
        """Returns the exposed seconds in which the optimizer's state travels.

        Its way to the host hides behind the next step's ``window`` seconds of computation. Its way back begins when the gradients
        are complete, and the step waits for it.
        """
        way = self._links.to_host(self.memory.states(plan.fold, held, False)[2])
        return way + self._links.hidden(way, window)

    def _casts(self, fold: Fold, held: RankLayers) -> tuple[float, float]:
        """Returns the seconds to cast this rank's pieces of weights before they are gathered, and gradients afterwards.

        A rank without others to share with casts whole weights, under full sharding in every micro-batch.
        """
        _, _, stored, gathered, reduced, _ = PRECISIONS[self.job.precision]
        if stored == gathered:
            return 0.0, 0.0
        local, trained = self.memory.parameters(fold.tp, fold.ep, fold.etp, held), self._trained(fold, held)
        pieces, gradients = (n.dense / (fold.dp * fold.cp) + n.expert / fold.edp for n in (local, trained))
        stream = self.layers.compute.stream
        return stream(pieces * (stored + gathered)), stream(gradients * (gathered + reduced))

    def _trained(self, fold: Fold, held: RankLayers) -> LocalParameters:
        """Returns how many numbers of both families have gradients on a rank."""
        if self.job.lora_rank is None:
            return self.memory.parameters(fold.tp, fold.ep, fold.etp, held)
        return LocalParameters(adapter_parameters(self.job.model, fold.tp, held.layers, self.job.lora_rank), 0)

    def _add_microbatches(self, times: dict[str, float], rank: RankTimes, microbatches: int) -> None:
        for seconds in (rank.block.forward, rank.block.backward):
            for name, value in seconds.items():
                times[name] += microbatches * value
        if rank.recompute:
            times["recompute"] += microbatches * rank.recompute
        if rank.sharding_forward or rank.sharding_backward:
            times["sharding"] += microbatches * (rank.sharding_forward + rank.sharding_backward)
        if rank.offload_backward:
            times["offload"] += microbatches * (rank.offload_forward + rank.offload_backward)

    # ---- data parallel -----------------------------------------------------------------------------------------

    def _sharded_traffic(self, fold: Fold, held: RankLayers) -> tuple[float, float]:
        """Returns the seconds to gather a rank's weights and to scatter their gradients, layer by layer."""
        _, _, _, gathered, reduced, _ = PRECISIONS[self.job.precision]
        local, trained = self.memory.parameters(fold.tp, fold.ep, fold.etp, held), self._trained(fold, held)
        per_node, units = self.job.hardware.gpus_per_node, max(held.layers, 1)
        gather, scatter = self._casts(fold, held)
        for number, gradients, axis in (
            (local.dense, trained.dense, "dp_cp"), (local.expert, trained.expert, "edp")
        ):  # fmt: skip
            shape = axis_shape(fold, axis, per_node)
            gather += units * self._links.gather(shape, number * gathered / units)
            if gradients:
                scatter += units * self._links.scatter(shape, gradients * reduced / units)
        return gather, scatter

    def gradients(self, fold: Fold, held: RankLayers, rank: RankTimes) -> float:
        """Returns the exposed seconds per step of reducing gradients and of gathering updated weights."""
        if self.job.sharding == "full":
            return 0.0
        gather, scatter = self._sharded_traffic(fold, held)
        if self.job.sharding == "none":  # an all-reduce is a reduce-scatter and an all-gather
            return self._links.hidden(2 * scatter, rank.backward)
        return self._links.hidden(scatter, rank.backward) + self._links.hidden(gather, rank.forward)

    def optimizer(self, fold: Fold, held: RankLayers) -> float:
        """Returns the seconds of Adam: it reads gradient, weight, moments; it writes weight, moments and the working copy."""
        _, _, stored, gathered, reduced, _ = PRECISIONS[self.job.precision]
        local = self._trained(fold, held)
        sharded = self.job.sharding != "none"
        number = local.dense / (fold.dp * fold.cp if sharded else 1) + local.expert / (fold.edp if sharded else 1)
        # Gradients are read twice: for the norm, then for the step.
        moved = number * (2 * reduced + 2 * stored + 2 * self.job.state_bytes + gathered)
        return self.layers.compute.stream(moved)

    # ---- pipeline ----------------------------------------------------------------------------------------------

    def messages(self, plan: Plan, microbatches: int) -> float:
        """Returns the exposed seconds of messages between stages.

        With 1F1B a rank waits for its neighbours; with several chunks per rank it computes another chunk meanwhile.
        """
        fold, job = plan.fold, self.job
        tokens = self.layers.tokens(plan.micro_batch_size, fold.cp) / fold.tp
        shape = axis_shape(fold, "pp", job.hardware.gpus_per_node)
        one = self._links.neighbour(shape, tokens * job.model.hidden_size * job.activation_bytes)
        chunks = plan.num_stages_per_rank
        exposed = 1.0 if chunks == 1 else 1 - job.hardware.kernels.overlap
        return 2 * one * exposed * (microbatches * chunks + fold.pp - 1)
