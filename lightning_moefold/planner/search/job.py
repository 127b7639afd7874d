# SPDX-License-Identifier: Apache-2.0
"""Job: a training job (model, machine, batch). Plan: one way to run it. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lightning_moefold.dispatch.config import DISPATCHER_NAMES, DROP_SCOPES
from lightning_moefold.errors import FoldError, PlanError
from lightning_moefold.fold import Fold
from lightning_moefold.models.blocks import check_blocks
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.quantization import BITS, QUANTIZATIONS, Quantization
from lightning_moefold.modules.recompute_parts import PARTS as RECOMPUTE_PARTS
from lightning_moefold.parallel.pipeline.plan import SCHEDULES, SPLIT_BACKWARD, V_SHAPED
from lightning_moefold.planner.cost.routing import BALANCED, RoutingProfile
from lightning_moefold.planner.machine.hardware import Hardware

#: For each precision, the dtype of matrix products, and bytes per number of an activation, a stored weight, a gathered
#: weight, a reduced gradient, and both Adam moments.
PRECISIONS: dict[str, tuple[str, int, int, int, int, int]] = {
    "bf16-mixed": ("bf16", 2, 4, 2, 4, 8),
    "bf16-true": ("bf16", 2, 2, 2, 4, 4),
    "fp8-mixed": ("fp8", 2, 4, 2, 4, 8),
    "32-true": ("fp32", 4, 4, 4, 4, 8),
    "64-true": ("fp64", 8, 8, 8, 8, 16),
}
SHARDINGS = ("none", "optimizer", "full")
#: Settings that a search tries, the fastest first. Others are parts of a layer, joined by commas, such as ``"norm,moe"``.
RECOMPUTES = ("none", "selective", "full")
#: What may travel to host memory: activations between forward and backward (``offload_activations``), the optimizer's state
#: between its steps (``offload_state``).
OFFLOADS = ("none", "activations", "state", "activations,state")
DISPATCHERS = tuple(name for name in DISPATCHER_NAMES if name != "auto")
__all__ = [
    "DISPATCHERS", "DROP_SCOPES", "OFFLOADS", "PRECISIONS", "RECOMPUTES", "RECOMPUTE_PARTS", "SCHEDULES", "SHARDINGS",
    "SPLIT_BACKWARD", "V_SHAPED", "Job", "Plan", "PlanError",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A training step to be planned.

    Args:
        model: Configuration of the model.
        world_size: Number of ranks.
        hardware: The machine.
        global_batch_size: Number of sequences per optimizer step.
        sequence_length: Number of tokens per sequence.
        precision: A key of :data:`PRECISIONS`.
        sharding: ``"none"``, ``"optimizer"`` or ``"full"`` (``data_parallel_sharding`` of the strategy).
        capacity_factor: Tokens an expert takes, relative to the mean; None drops nothing.
        routing: How unevenly tokens choose experts.
        drop_scope: Of whose tokens the capacity is a share: ``"full_sequence"``, a row's, or ``"sub_sequence"``, a rank's.
        pad_to_capacity: Every rank sends every expert as many rows as it may serve.
        dispatch_chunks: Parts in which tokens travel, behind the experts of one another.
        copies_per_rank: Experts of a layer of which a rank may have copies for one pass; they count as memory.
        master_weights: Whether ``MasterWeights`` keeps float32 copies of 16-bit weights, which it updates.
        lora_rank: Rank of an adapter of all attention projections that is trained instead of the model; None to train the
            model.
        quantize: How the frozen weights beside an adapter are stored, ``"nf4"`` or ``"int8"``; None as numbers.
        name: Name or directory of the model, for output.
    """

    model: MoEConfig
    world_size: int
    hardware: Hardware
    global_batch_size: int
    sequence_length: int
    precision: str = "bf16-mixed"
    sharding: str = "optimizer"
    capacity_factor: float | None = None
    routing: RoutingProfile = BALANCED
    drop_scope: str = "full_sequence"
    pad_to_capacity: bool = False
    dispatch_chunks: int = 1
    copies_per_rank: int = 0
    master_weights: bool = False
    lora_rank: int | None = None
    quantize: Quantization | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.model.is_packed:
            raise PlanError(
                "the planner does not know experts of uneven widths; plan the model that was pruned, and give its fold."
            )
        for name in ("world_size", "global_batch_size", "sequence_length", "dispatch_chunks"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, known in (
            ("precision", tuple(PRECISIONS)), ("sharding", SHARDINGS), ("drop_scope", DROP_SCOPES)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise PlanError(f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(known)}.")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise PlanError(f"capacity_factor={self.capacity_factor} must be positive, or left out to drop nothing.")
        if self.pad_to_capacity and self.capacity_factor is None:
            raise PlanError("pad_to_capacity needs a capacity_factor, which says how far to pad; give one.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise PlanError(f"lora_rank={self.lora_rank} must be at least 1; leave it out to train the whole model.")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise PlanError(f"quantize={self.quantize!r} is not known; use one of {', '.join(QUANTIZATIONS)}.")
        if self.quantize is not None and self.lora_rank is None:
            raise PlanError(f"quantize={self.quantize!r} stores frozen weights; give lora_rank too, or leave it out.")
        if self.quantize is not None:
            try:
                check_blocks(self.model, Fold(1))
            except FoldError as error:
                raise PlanError(f"quantize={self.quantize!r} does not fit: {error}") from None
        if self.master_weights and self.precision != "bf16-true":
            raise PlanError(
                f"master_weights are float32 copies of bfloat16 weights, and {self.precision} stores none; use bf16-true, or "
                "leave them out."
            )

    def with_routing(self, routing: RoutingProfile) -> Job:
        """Returns the same job with another routing profile."""
        return replace(self, routing=routing)

    @property
    def dispatchers(self) -> tuple[str, ...]:
        """Those that can do what is asked for: only the all-to-all pads, sends in parts, and to copies of experts."""
        limited = self.pad_to_capacity or self.dispatch_chunks > 1 or self.copies_per_rank
        return ("alltoall",) if limited else DISPATCHERS

    @property
    def dtype(self) -> str:
        """Data type of matrix products."""
        return PRECISIONS[self.precision][0]

    @property
    def activation_bytes(self) -> int:
        """Bytes per number of the hidden states between layers."""
        return PRECISIONS[self.precision][1]

    @property
    def bytes_of_number(self) -> float:
        """Bytes of a number of a weight that ``quantize`` stores, its share of the scales included."""
        return 0.0 if self.quantize is None else BITS[self.quantize] / 8

    @property
    def state_bytes(self) -> int:
        """Bytes per trained number that the optimizer keeps: both moments, and the float32 master with its float32 moments.

        Moments have the dtype of what is trained; that of an adapter is at least float32.
        """
        if self.lora_rank is not None:
            return 2 * max(4, PRECISIONS[self.precision][2])
        return 4 + 8 if self.master_weights else PRECISIONS[self.precision][5]

    @cached_property
    def model_flops(self) -> float:
        """Model FLOPs of one step, which MFU counts.

        They are forward plus twice that for backward, of active experts only, without recomputation. Causal attention
        counts the half of the square that it computes, and dropped choices do not count. An adapter's training takes no
        gradients of frozen weights, and the adapter's own products.
        """
        tokens, model = self.global_batch_size * self.sequence_length, self.model
        expert = 2 * 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts_per_tok
        dropped = (1 - self.kept) * expert * model.num_moe_layers
        forward = model.forward_flops_per_token(self.sequence_length) - dropped
        if self.lora_rank is None:
            return 3 * tokens * forward
        q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        keys = sum(model.attended_keys(i, self.sequence_length) for i in range(model.num_hidden_layers))
        adapter = model.num_hidden_layers * self.lora_rank * (4 * model.hidden_size + 2 * q + 2 * kv)
        return tokens * (2 * forward + 2 * 2 * q * keys + 3 * 2 * adapter)

    @cached_property
    def kept(self) -> float:
        """Share of the choices that are not dropped."""
        model = self.model
        return self.routing.load_factor(model.num_experts, model.num_experts_per_tok, 1, self.capacity_factor)

    @property
    def peak_flops(self) -> float:
        """Dense peak of one rank by which MFU divides (that of bf16 if products run in fp8)."""
        return self.hardware.peak("bf16" if self.dtype == "fp8" else self.dtype)


@dataclass(frozen=True)
class Plan:
    """One way to run a job.

    Args:
        fold: The sizes.
        micro_batch_size: Number of sequences in a micro-batch of one data-parallel rank.
        schedule: Pipeline schedule; it has no effect at pp = 1.
        num_stages_per_rank: Number of model chunks per rank in interleaved and V-shaped schedules.
        recompute: ``"none"``, ``"selective"`` (the attention half of each layer), ``"full"`` (whole layers), as in the
            strategy; or its parts, joined by commas (:data:`RECOMPUTE_PARTS`).
        dispatcher: Name of the dispatcher.
        offload: One of :data:`OFFLOADS`.
    """

    fold: Fold
    micro_batch_size: int = 1
    schedule: str = "1f1b"
    num_stages_per_rank: int = 1
    recompute: str = "none"
    dispatcher: str = "alltoall"
    offload: str = "none"

    def offloads(self, what: str) -> bool:
        """Whether ``"activations"`` or ``"state"`` travel to host memory."""
        return what in self.offload.split(",")

    def num_microbatches(self, job: Job) -> int:
        """Returns the number of micro-batches per step on one data-parallel rank."""
        return max(job.global_batch_size // (self.fold.dp * self.micro_batch_size), 1)

    def __str__(self) -> str:
        text = f"{self.fold}  mbs {self.micro_batch_size}"
        if self.fold.pp > 1:
            chunks = f" x{self.num_stages_per_rank}" if self.num_stages_per_rank > 1 else ""
            text += f"  {self.schedule}{chunks}"
        if self.recompute != "none":
            text += f"  recompute {self.recompute}"
        if self.offload != "none":
            text += f"  offload {self.offload}"
        return text + (f"  {self.dispatcher}" if self.dispatcher != "alltoall" else "")
