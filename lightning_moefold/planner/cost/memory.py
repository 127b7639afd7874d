# SPDX-License-Identifier: Apache-2.0
"""Predicts the peak memory of one rank from shapes. Pure Python.

Legend: as in ``layer.py``; per number, s bytes of a stored weight, g of a gathered weight, r of a reduced gradient, o
    of both moments.

Weights are stored, and optimizer states kept, in the shard of the family's data axis (dense: dp x cp, experts: edp).
Shards are gathered in equal pieces, which are padded if the data ranks do not divide a weight's first dimension: for
example, the 8 rows of a router over 256 ranks are gathered as 256 rows, in float32 as the router computes.
``"optimizer"`` keeps the gathered weights and, while micro-batches accumulate, whole gradients. ``"full"`` gathers only
two layers at a time and scatters the gradients of each micro-batch. ``"none"`` shards nothing. Weights that ``quantize``
stores in fewer bytes are on every data rank, and are decoded for a product at a time. Activations are the
tensors that autograd saves between forward and backward, times the chunks in flight of the pipeline schedule.

Offloaded activations leave three layers' on the device: that in which backward is, the one before it, and the one before that,
which comes back meanwhile. Offloaded state is away in forward and backward, and whole during the optimizer's step, when no
activations exist; so it counts as far as it is larger than what exists only before the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from lightning_moefold.fold import Fold
from lightning_moefold.modules.logit_chunks import chunk_rows
from lightning_moefold.modules.recompute_parts import LAYER, parse_recompute, recompute_parts
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.parameters import (
    Shapes,
    adapter_parameters,
    count,
    dense_shapes,
    expert_shapes,
    quantized_shapes,
    router_shapes,
    shard,
    without,
)
from lightning_moefold.planner.cost.schedules import RankLayers, chunks_in_flight, pipeline_layout
from lightning_moefold.planner.search.job import PRECISIONS, Job, Plan


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Args:
        weights: Bytes of stored and gathered weights.
        gradients: Bytes of gradients at their peak.
        optimizer: Bytes of both moments (the fp32 copy is the stored weight). Of offloaded ones, the bytes beyond
            ``activations``, ``buffers`` and ``logits``, in whose place they are during the step.
        activations: Bytes saved for backward, without those in host memory.
        buffers: Temporary bytes inside one layer: rows being exchanged, or the experts' backward pass.
        logits: Bytes of one chunk of logits with the gradients of head and hidden states, beyond the memory of
            ``buffers``, which is free at that moment.
        host_activations: Bytes of activations in host memory, which are no part of the total.
        host_state: Bytes of the optimizer's state there, likewise.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    logits: float
    host_activations: float = 0.0
    host_state: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.logits

    def as_dict(self) -> dict[str, float]:
        """Returns the bytes of each part of the total."""
        return {name: size for name, size in vars(self).items() if not name.startswith("host_")}

    @property
    def host(self) -> float:
        """Bytes in host memory."""
        return self.host_activations + self.host_state


@dataclass(frozen=True)
class LocalParameters:
    """Numbers of parameters on one rank before data-parallel sharding.

    Args:
        dense: Number in attention, norms, routers, shared experts, dense layers, embedding, head.
        expert: Number in routed experts.
    """

    dense: int
    expert: int


class MemoryModel:
    """Predicts the memory of a job's plans.

    Args:
        costs: Layer costs of the same job, which may have another sharding.
        job: The training job; that of the costs by default.
    """

    def __init__(self, costs: LayerCosts, job: Job | None = None) -> None:
        self.costs, self.job, self.model = costs, job or costs.job, costs.model
        self.parameters = lru_cache(maxsize=None)(self._parameters)
        self.shards = lru_cache(maxsize=None)(self._shards)
        self.gathered = lru_cache(maxsize=None)(self._gathered_bytes)
        self.states = lru_cache(maxsize=None)(self._states)
        self._saved = lru_cache(maxsize=None)(self._saved_per_layer)

    # ---- parameters --------------------------------------------------------------------------------------------

    def _parameters(self, tp: int, ep: int, etp: int, layers: RankLayers) -> LocalParameters:
        dense, expert = self._shapes(tp, ep, etp, layers)
        return LocalParameters(count(dense), count(expert))

    def _shapes(self, tp: int, ep: int, etp: int, layers: RankLayers) -> tuple[Shapes, Shapes]:
        """Returns the shapes of both families, without what ``quantize`` stores in fewer bytes."""
        dense, expert = dense_shapes(self.model, tp, layers), expert_shapes(self.model, ep, etp, layers.moe)
        if self.job.quantize is None:
            return dense, expert
        return without(dense, quantized_shapes(self.model, tp, layers)), {}

    def quantized_bytes(self, tp: int, ep: int, etp: int, layers: RankLayers) -> float:
        """Returns the bytes of what ``quantize`` stores, which data ranks do not share among them."""
        if self.job.quantize is None:
            return 0.0
        expert = expert_shapes(self.model, ep, etp, layers.moe)
        return (count(quantized_shapes(self.model, tp, layers)) + count(expert)) * self.job.bytes_of_number

    def _shards(self, tp: int, ep: int, etp: int, layers: RankLayers, ranks: int, edp: int) -> tuple[int, int]:
        """Returns how many numbers of both families a rank stores after ``fully_shard`` over ``ranks`` and ``edp``."""
        dense, expert = self._shapes(tp, ep, etp, layers)
        return shard(dense, ranks), shard(expert, edp, experts=True)

    def _gathered_bytes(self, tp: int, ep: int, etp: int, layers: RankLayers, ranks: int, edp: int) -> tuple[int, int]:
        """Returns the gathered bytes of both families: equal pieces, and the router's weight in its stored dtype."""
        _, _, stored, gathered, _, _ = PRECISIONS[self.job.precision]
        dense, expert = self.shards(tp, ep, etp, layers, ranks, edp)
        routers = shard(router_shapes(self.model, layers.moe), ranks)
        return ranks * (gathered * dense + (stored - gathered) * routers), edp * gathered * expert

    def _states(self, fold: Fold, layers: RankLayers, accumulates: bool) -> tuple[float, float, float]:
        """Returns the bytes of weights, gradients and moments on the first data rank of a pipeline rank, which stores most.

        Args:
            fold: The sizes.
            layers: The layers that the pipeline rank holds.
            accumulates: Whether gradients of several micro-batches are added before they are reduced. In a pipeline,
                which reduces once, they always are.
        """
        _, _, stored, gathered, reduced, _ = PRECISIONS[self.job.precision]
        cut, sharding = (fold.tp, fold.ep, fold.etp), self.job.sharding
        spreads = (1, 1) if sharding == "none" else (fold.dp * fold.cp, fold.edp)
        held = self.parameters(*cut, layers)
        kinds = [kind for kind, n in ((RankLayers(1, 0), layers.moe), (RankLayers(0, 1), layers.dense)) if n]
        ends = RankLayers(0, 0, layers.first, layers.last)
        weights, gradients, optimizer = self.quantized_bytes(*cut, layers), 0.0, 0.0
        for i, (number, spread) in enumerate(zip((held.dense, held.expert), spreads, strict=True)):
            largest = max(kinds, key=lambda k: self.gathered(*cut, k, *spreads)[i], default=RankLayers(0, 0))
            mine = self.shards(*cut, layers, *spreads)[i]
            layer = spread * self.shards(*cut, largest, *spreads)[i] if spread > 1 else 0
            if sharding == "full":  # two layers at a time, and the ends from forward to backward
                live = 2 * self.gathered(*cut, largest, *spreads)[i] + self.gathered(*cut, ends, *spreads)[i]
                reducing = number - mine if fold.pp > 1 else layer
            else:
                live = self.gathered(*cut, layers, *spreads)[i]
                reducing = number - mine if accumulates or fold.pp > 1 else layer
            weights += mine * stored + (live if spread > 1 or gathered != stored else 0)
            if self.job.lora_rank is None:
                gradients += mine * stored + reducing * reduced
                optimizer += mine * self.job.state_bytes
            elif i == 0:  # only the adapter is trained, of the dense family, in at least float32
                number = adapter_parameters(self.model, fold.tp, layers.layers, self.job.lora_rank)
                mine, own = ceil(number / spread), max(4, stored)
                weights += mine * own + number * (gathered if gathered < stored else own)
                gradients += mine * own + (number - mine) * reduced
                optimizer += mine * self.job.state_bytes
        return weights, gradients, optimizer

    # ---- activations -------------------------------------------------------------------------------------------

    def _saved_per_layer(
        self, tp: int, cp: int, ep: int, etp: int, micro_batch: int, recompute: str, dispatcher: str
    ) -> tuple[float, float, float]:
        """Returns the bytes that autograd keeps of a layer with experts, of a dense one, and the temporary peak inside one."""
        model, b = self.model, self.job.activation_bytes
        d, n = model.hidden_size, self.costs.tokens(micro_batch, cp)
        t = ceil(n / tp)
        q = ceil(model.num_attention_heads / tp) * model.head_dim
        kv = self.costs.local_kv_heads(tp) * model.head_dim
        norm = n * d * b  # the gathered output of the norm feeds q, k, v
        heads = (2 + model.qk_norm) * q + (2 + model.qk_norm) * kv  # q, k, v, output; with norms their inputs too
        attention = t * d * b + norm + n * heads * b + n * ceil(model.num_attention_heads / tp) * 4
        f, shared = ceil(model.moe_intermediate_size / etp), ceil(model.shared_expert_intermediate_size / tp)
        sent = t * model.num_experts_per_tok
        rows = sent * self.costs.load(ep, tp * cp) * etp
        gated = rows * f * b
        # The router keeps its input in fp32. Without a cast or a gather, it shares this tensor with the shared expert.
        router = (0 if b >= 4 and shared and tp == 1 else t * d * max(b, 4)) + 2 * t * model.num_experts * 4
        # The gated product is made again; a row has its token's number and its weight.
        # Copies of experts stay until backward, where they have gradients of their own.
        copies = (self.job.copies_per_rank if ep > 1 else 0) * 3 * f * d * b
        experts = t * d * b + router + rows * d * b + 2 * gated + 12 * rows + copies
        # What the norm makes: the gathered input of products, and that of the router if it is not cast.
        normed = router - 2 * t * model.num_experts * 4 if b >= 4 else 0.0
        if shared:
            experts += n * d * b + 3 * n * shared * b + t * d * b
            normed += n * d * b
        dense = t * d * b + n * d * b + 3 * n * ceil(model.intermediate_size / tp) * b
        if self.job.lora_rank:  # each projection keeps its rows times A; frozen products need no inputs
            attention += 4 * n * self.job.lora_rank * b
            experts -= router - 2 * t * model.num_experts * 4 + (n * d * b + n * shared * b if shared else 0)
            dense -= n * d * b + n * ceil(model.intermediate_size / tp) * b
            normed = 0.0
        decoded = self._decoded(tp, ep, etp)
        exchange = t * self._under_way(tp * cp, ep, etp, dispatcher) * d * b
        live = max(exchange + rows * d * b * (1 + (etp > 1)), self._experts_backward(ep, rows, f) + copies) + decoded
        parts = recompute_parts(parse_recompute(recompute))
        activation = 2 * gated if "expert_activation" in parts else 0.0
        halves = (("moe", experts, normed, activation), ("mlp", dense, norm, 0.0))
        moe, mlp, made = self._kept_of_layers(parts, t * d * b, attention, norm, halves)
        return moe, mlp, live + made

    def _kept_of_layers(
        self,
        parts: frozenset[str],
        layer: float,
        attention: float,
        norm: float,
        halves: tuple[tuple[str, float, float, float], ...],
    ) -> tuple[float, float, float]:
        """Returns the bytes that autograd keeps of both kinds of layer, and the most that backward makes again at a time.

        Args:
            parts: What is recomputed.
            layer: Bytes of a layer's input.
            attention: Bytes of the attention half.
            norm: Bytes of what its norm makes.
            halves: Of the half with experts and of the dense one the name, the bytes, those of what its norm makes, and those
                of recomputed activations.
        """
        (_, experts, _, _), (_, dense, _, _) = halves
        if LAYER in parts:
            return layer, layer, attention + max(experts if self.costs.num_moe else 0.0, dense)
        made: list[float] = [attention] if "attention" in parts else [norm] if "norm" in parts else []
        kept = layer if "attention" in parts else attention - norm * ("norm" in parts)
        sizes: list[float] = []
        for half, whole, of_norm, activation in halves:
            if half in parts:
                made.append(whole if half == "mlp" or self.costs.num_moe else 0.0)
                sizes.append(kept + layer)
            else:
                dropped = activation + of_norm * ("norm" in parts)
                made.append(dropped)
                sizes.append(kept + whole - dropped)
        return sizes[0], sizes[1], max(made)

    def _under_way(self, spread: int, ep: int, etp: int, dispatcher: str) -> float:
        """Returns the rows per token of a rank that exist during the exchange: rows sent, and rows received by the busiest rank.

        With two steps, the rows received by the node stay while they are passed on within it; the rows sent to other
        nodes are freed.
        """
        if dispatcher == "allgather":
            return 2 * ep * etp
        if dispatcher == "alltoall":
            padded = self.costs.load(ep, spread) if self.job.pad_to_capacity else 1.0
            return 2 * self.model.num_experts_per_tok * padded
        ranks, nodes = self.costs.pairs(ep), self.costs.nodes(ep, etp, dispatcher)
        if nodes == 1:
            return ranks.mean + ranks.busiest
        pairs = self.costs.pairs(nodes)
        return pairs.busiest * (1 + ranks.mean / pairs.mean) + ranks.busiest

    def _decoded(self, tp: int, ep: int, etp: int) -> float:
        """Returns the bytes of the largest weight, or stack of experts, that is decoded for a product."""
        if self.job.quantize is None:
            return 0.0
        layers = RankLayers(1, 1)
        shapes = quantized_shapes(self.model, tp, layers) | expert_shapes(self.model, ep, etp, 1)
        return max(prod(shape) for shape in shapes) * self.job.activation_bytes

    def _experts_backward(self, ep: int, rows: float, f: int) -> float:
        """Returns the temporary bytes in the backward pass of a layer's experts, at the fuller of two moments.

        The first moment is the gradient of the router weights: it needs the outputs' gradient, the activation, its
        product and their gradient, and two of these in at least fp32. The second is the end: it needs the gradients of
        both products, three gradients of their inputs (of each product, and their sum), and the experts' gradients,
        which are added to fp32 sums if products run in a narrower dtype.
        """
        _, b, _, gathered, reduced, _ = PRECISIONS[self.job.precision]
        d = self.model.hidden_size
        summed = gathered < reduced and self.job.quantize is None
        weights = self.model.num_experts // ep * 3 * f * d * (gathered if summed else 0)
        wide = 4 if b < 4 else 0
        return max(rows * d * b + rows * f * (3 * b + 2 * wide), rows * f * 2 * b + 3 * rows * d * b + weights)

    def estimate(self, plan: Plan) -> Memory:
        """Predicts the memory of a plan's fullest rank."""
        fold = plan.fold
        layout = pipeline_layout(self.model, fold.pp, plan.num_stages_per_rank, plan.schedule)
        # Candidates: the first rank (most in flight), the first rank with most layers, and the last rank (logits).
        most = max(range(fold.pp), key=lambda r: layout[r].layers)
        ranks = {0, most, fold.pp - 1} | {r for r, layers in enumerate(layout) if layers.last}
        candidates = [self.on_rank(plan, rank, layout[rank]) for rank in sorted(ranks)]
        return max(candidates, key=lambda memory: memory.total)

    def on_rank(self, plan: Plan, rank: int, layers: RankLayers) -> Memory:
        """Predicts the memory of a pipeline rank with ``layers``, on its first data rank, which stores most."""
        fold, microbatches, chunks = plan.fold, plan.num_microbatches(self.job), plan.num_stages_per_rank
        saved = self.saved(plan)
        weights, gradients, optimizer = self.states(fold, layers, microbatches > 1)
        flight = chunks_in_flight(plan.schedule, fold.pp, chunks, microbatches, rank) / chunks
        one = layers.moe * saved[0] + layers.dense * saved[1]
        activations, away, state = flight * one, 0.0, 0.0
        if plan.offloads("activations"):
            away, activations = activations, min(activations, 3 * self.largest_layer(layers, saved))
        elif fold.pp > 1 and plan.schedule in ("gpipe", "1f1b") and flight >= microbatches:
            # No forward follows a backward, so whole gradients never exist together with the activations they came
            # from.
            activations -= min(gradients, one)
        logits = 0.0
        if layers.last:
            transient, kept = self._loss(fold, self.costs.tokens(plan.micro_batch_size, fold.cp))
            logits = max(transient - saved[2], 0.0) + (flight - 1) * kept
        if plan.offloads("state"):
            state, optimizer = optimizer, max(optimizer - activations - saved[2] - logits, 0.0)
        return Memory(weights, gradients, optimizer, activations, saved[2], logits, away, state)

    @staticmethod
    def largest_layer(layers: RankLayers, saved: tuple[float, ...]) -> float:
        """Returns the bytes that the fuller kind of layer on a rank keeps for backward."""
        return max(saved[0] if layers.moe else 0.0, saved[1] if layers.dense else 0.0)

    def saved(self, plan: Plan) -> tuple[float, float, float]:
        """Returns what :meth:`_saved_per_layer` returns of a micro-batch of a plan."""
        fold = plan.fold
        return self._saved(fold.tp, fold.cp, fold.ep, fold.etp, plan.micro_batch_size, plan.recompute, plan.dispatcher)

    def _loss(self, fold: Fold, n: int) -> tuple[float, float]:
        """Returns the peak bytes at the head, and the bytes that the head keeps for backward.

        The head computes its gradients together with the loss, one chunk of logits at a time. The gradients of the
        weight and of the hidden states are kept for backward. The sum of the former over chunks is in at least fp32,
        like logits and their gradients.
        """
        b, d, v = self.job.activation_bytes, self.model.hidden_size, ceil(self.model.vocab_size / fold.tp)
        wide = max(4, b)
        both = wide + b if b < wide else wide  # in fp32, and in the products' dtype
        rows = min(n, chunk_rows(self.model.vocab_size, fold.tp, self.job.hardware.device))
        # Gathered hidden states, those with a label, and their gradient.
        return rows * v * both + v * d * both + 3 * n * d * b, (v + n) * d * b
