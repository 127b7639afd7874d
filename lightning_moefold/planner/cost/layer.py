# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of one decoder layer on the busiest rank, forward and backward, by kind of work. Pure Python.

Legend: N tokens of a micro-batch on a tp group (rows * sequence / cp), T = N / tp tokens of this rank, K experts per
token, M = T * K * etp * load rows that this rank computes, D hidden size, F expert width, b bytes per activation.

A layer is a sum of blocks: attention(tp, cp), experts(ep, etp), a gated MLP (dense layer or shared expert; tp), and the
two ends of the model. A block depends on few sizes, so thousands of folds share a few hundred blocks (memoised).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from lightning_moefold.modules.attention.exchanges import (
    exchange_for,
    has_kernel_for_runs,
    heads_of_message,
    padded_length,
)
from lightning_moefold.modules.recompute_parts import LAYER
from lightning_moefold.planner.cost.exchange import ExchangeCosts
from lightning_moefold.planner.machine.kernels import Compute
from lightning_moefold.planner.machine.links import GroupShape
from lightning_moefold.planner.search.job import Job

#: Bytes of element-wise work in backward divided by forward: a norm reads one more tensor, a gated activation two.
_ELEMENTWISE_BACKWARD = 1.5
#: Kernel launches in the forward pass of a layer's parts; backward launches about twice as many. Each further chunk of
#: tokens is sorted, computed and summed by its own kernels. (``benchmarks/cuda_bytes.py`` counts 110 launches of a Mixtral
#: layer, forward and backward, and 124 with a shared expert, on fake CUDA tensors and one rank; sorting for other ranks and
#: collectives add to that.) When the host waits for counts, the device's queue runs empty: what is launched until the first
#: product, as many kernels as a chunk has, is exposed whole.
_LAUNCHES = {"attention": 15, "experts": 30, "chunk": 15, "mlp": 6}


@dataclass(frozen=True)
class Block:
    """Seconds of a part of the model, forward and backward.

    Args:
        forward: Seconds of forward by kind of work.
        backward: Seconds of backward by kind of work, gradients of weights included.
        weight: The part of ``backward`` that computes gradients of weights, for which no other rank waits.
        again: Seconds of what backward may repeat: of ``"attention"``, the half of a layer; of ``"experts"``, two of the three
            products; of ``"attention norm"`` and ``"feed norm"``, the norm of each half with its gather over tp.
    """

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    weight: float = 0.0
    again: Mapping[str, float] = field(default_factory=dict)
    forward_total: float = field(init=False)
    backward_total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward_total", sum(self.forward.values()))
        object.__setattr__(self, "backward_total", sum(self.backward.values()))


def combine(parts: list[tuple[float, Block]]) -> Block:
    """Adds blocks, each multiplied by its number."""
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    repeated: dict[str, float] = {}
    weight = 0.0
    for times, block in parts:
        if not times:
            continue
        for total, seconds in ((forward, block.forward), (backward, block.backward), (repeated, block.again)):
            for name, value in seconds.items():
                total[name] = total.get(name, 0.0) + times * value
        weight += times * block.weight
    return Block(forward, backward, weight, repeated)


def seconds_again(layer: Block, parts: frozenset[str], half: str) -> float:
    """Returns the seconds of a layer's forward pass that backward repeats.

    Args:
        layer: The layer.
        parts: Of :func:`~.recompute_parts.recompute_parts`.
        half: What the half after attention is called: ``"moe"`` or ``"mlp"``.
    """
    attention, whole = layer.again["attention"], LAYER in parts
    seconds = attention if whole or "attention" in parts else 0.0
    if "norm" in parts and not seconds:
        seconds += layer.again["attention norm"]
    if whole or half in parts:
        return seconds + layer.forward_total - attention
    if "norm" in parts:
        seconds += layer.again["feed norm"]
    return seconds + layer.again.get("experts", 0.0) * ("expert_activation" in parts)


class LayerCosts(ExchangeCosts):
    """Computes the blocks of a job's model, memoised."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.compute = Compute(job.hardware, job.dtype, job.activation_bytes)
        self.attention = lru_cache(maxsize=None)(self._attention)
        self.experts = lru_cache(maxsize=None)(self._experts)
        self.mlp = lru_cache(maxsize=None)(self._mlp)
        self.ends = lru_cache(maxsize=None)(self._ends)
        self.layers = lru_cache(maxsize=None)(self._layers)
        self.whole = lru_cache(maxsize=None)(self._whole)
        self.num_moe = job.model.num_moe_layers
        #: Products in backward for one in forward, and those of them that make gradients of weights.
        self._backward, self._weights = (2, 1) if job.lora_rank is None else (1, 0)
        windows = self.model.sliding_windows
        #: The share of layers that have each window.
        self._windows = {window: number / len(windows) for window, number in Counter(windows).items()}

    def tokens(self, micro_batch: int, cp: int) -> int:
        """Returns N, including the padding of lengths that are not a multiple of 2 cp."""
        return micro_batch * padded_length(self.job.sequence_length, cp) // cp

    # ---- blocks ------------------------------------------------------------------------------------------------

    def _attention(self, tp: int, cp: int, micro_batch: int) -> Block:
        """Computes the attention half: norm, all-gather, q k v, attention, o, reduce-scatter, residual."""
        model, b = self.model, self.job.activation_bytes
        n, d = self.tokens(micro_batch, cp), model.hidden_size
        q = ceil(model.num_attention_heads / tp) * model.head_dim
        kv = self.local_kv_heads(tp) * model.head_dim
        gemm = self.compute.gemm(n, q + 2 * kv, d) + self.compute.gemm(n, d, q)
        core, core_backward, meet, meet_backward = self._core(n, q, kv, tp, cp, micro_batch)
        elementwise = self.compute.stream(b * (5 * n / tp * d + 2 * n * (q + kv)))
        tp_comm = self.links.reduce(self.shape(tp, 1), n * d * b)
        forward = {"gemm": gemm, "attention": core, "elementwise": elementwise, "tp": tp_comm}
        adapter = self._adapter(n, q, kv)
        forward["gemm"] += adapter
        decode = self._decode(2 * d * (q + kv))
        forward["elementwise"] += decode
        backward = {
            "gemm": self._backward * gemm + 2 * adapter,
            "attention": core_backward,
            "elementwise": _ELEMENTWISE_BACKWARD * elementwise + decode,
            "tp": tp_comm,
        }
        self._add_casts(forward, backward, n, d + q, q + 2 * kv + d)
        if cp > 1:
            forward["cp"], backward["cp"] = meet, meet_backward
        norm = self._norm(n / tp) + self.links.gather(self.shape(tp, 1), n * d * b)
        made = self._weights * gemm + adapter
        return self._with_launches("attention", forward, backward, made, {"attention norm": norm})

    def _norm(self, tokens: float) -> float:
        """Returns the seconds of a norm, which reads and writes each token."""
        return self.compute.stream(2 * self.job.activation_bytes * tokens * self.model.hidden_size)

    def _decode(self, numbers: int) -> float:
        """Returns the seconds in which weights that ``quantize`` stores are decoded once."""
        job = self.job
        return self.compute.stream(numbers * (job.bytes_of_number + job.activation_bytes)) if job.quantize else 0.0

    def _adapter(self, n: int, q: int, kv: int) -> float:
        """Returns the seconds of the products of an adapter on q, k, v and o, forward; backward makes twice as many."""
        r, d = self.job.lora_rank, self.model.hidden_size
        if r is None:
            return 0.0
        gemm = self.compute.gemm
        return 3 * gemm(n, r, d) + gemm(n, q, r) + 2 * gemm(n, kv, r) + gemm(n, r, q) + gemm(n, d, r)

    def _core(self, n: int, q: int, kv: int, tp: int, cp: int, micro_batch: int) -> tuple[float, float, float, float]:
        """Returns mean seconds of a layer: of attention to keys, forward and backward, and of the exchanges over cp that it awaits.

        Args:
            n: Number of query tokens.
            q: Number of query heads times head size on this rank.
            kv: Number of key/value heads times head size on this rank.
            tp: Tensor parallel size.
            cp: Context parallel size.
            micro_batch: Number of rows.
        """
        length, b, seconds = self.job.sequence_length, self.job.activation_bytes, [0.0] * 4
        pair, heads = 2 * n * kv * b, self.local_kv_heads(tp)
        groups = ceil(heads / heads_of_message(heads, pair // heads))
        for window, share in self._windows.items():
            exchange = self.context_exchange(tp, cp, micro_batch, window)
            most = min(window or length, length)
            keys = most * (1 - (most - 1) / (2 * length))
            core = self.compute.attention(n, keys, q, most / cp if exchange == "ring" else most)
            meet = self._meet(exchange, self.shape(cp, tp), n * q * b, pair, groups, *core) if cp > 1 else (0.0, 0.0)
            seconds = [total + share * value for total, value in zip(seconds, (*core, *meet), strict=True)]
        return seconds[0], seconds[1], seconds[2], seconds[3]

    def context_exchange(self, tp: int, cp: int, micro_batch: int, window: int | None) -> str:
        """Returns the exchange that ``context_parallel_exchange="auto"`` chooses (:mod:`~.attention.context`).

        Args:
            tp: Tensor parallel size.
            cp: Context parallel size.
            micro_batch: Number of rows.
            window: A query sees at most this many keys; None for all. Where a window hides keys, CUDA's kernel takes gathered
                keys that would otherwise go around a ring.
        """
        if cp == 1:
            return "none"
        heads, kv, size = ceil(self.model.num_attention_heads / tp), self.local_kv_heads(tp), self.model.head_dim
        row = 2 * self.tokens(micro_batch, cp) * cp * kv * size * self.job.activation_bytes
        exchange = exchange_for(cp, heads, kv, row)
        hidden = window is not None and window < padded_length(self.job.sequence_length, cp)
        on_cuda = self.job.hardware.device == "cuda"
        one_kernel = hidden and on_cuda and has_kernel_for_runs(size, self.job.activation_bytes)
        return "all_gather" if exchange == "ring" and one_kernel else exchange

    def _meet(
        self,
        exchange: str,
        group: GroupShape,
        queries: float,
        pair: float,
        groups: int,
        core: float,
        core_backward: float,
    ) -> tuple[float, float]:
        """Returns the exposed seconds, forward and backward, of the exchange of a row's queries and keys over cp.

        Args:
            exchange: Name of the exchange.
            group: The cp group.
            queries: Bytes of a rank's queries.
            pair: Bytes of a rank's keys and values.
            groups: Number of groups of heads that travel one after the other.
            core: Seconds of attention forward, which overlaps with a ring's messages and with gathered keys of other heads.
            core_backward: Seconds of attention backward.
        """
        wide = max(4 / self.job.activation_bytes, 1)  # gradients of keys and values travel in fp32
        if exchange == "all_to_all":
            # Sends queries, keys and values, returns the output; backward sends gradients back.
            seconds = self.links.exchange(group, queries + pair) + self.links.exchange(group, queries)
            return seconds, seconds
        if exchange == "all_gather":  # backward gathers again and reduce-scatters gradients
            # What travels for one group of heads overlaps with another group's attention.
            gather = self.links.gather(group, group.size * pair / groups)
            back = gather + self.links.scatter(group, group.size * pair * wide / groups)
            there = gather + (groups - 1) * self.links.hidden(gather, core / groups)
            return there, back + (groups - 1) * self.links.hidden(back, core_backward / groups)
        # Each of cp - 1 messages of a group of heads overlaps with the attention of one step. In backward, gradients follow one
        # step behind, and the last step home is exposed.
        steps, part = group.size - 1, group.size * groups
        there = steps * self.links.hidden(self.links.neighbour(group, pair / groups), core / part)
        both = self.links.neighbour(group, pair * (1 + wide) / groups)
        back = steps * self.links.hidden(both, core_backward / part) + self.links.neighbour(group, pair * wide / groups)
        return groups * there, groups * back

    def local_kv_heads(self, tp: int) -> int:
        """Returns the key/value heads that a rank computes: its share, or those its queries need if tp does not divide them."""
        kv, heads = self.model.num_key_value_heads, self.model.num_attention_heads
        return kv // tp if kv % tp == 0 else min(kv, ceil(ceil(heads / tp) * kv / heads) + (heads % tp > 0))

    def _experts(self, ep: int, etp: int, tokens: int, dispatcher: str, spread: int = 1) -> Block:
        """Computes the expert half: norm, router, dispatch, experts, combine, residual; ``spread`` ranks share a row."""
        model, b, k = self.model, self.job.activation_bytes, self.model.num_experts_per_tok
        d, f, local = model.hidden_size, ceil(model.moe_intermediate_size / etp), model.num_experts // ep
        load = self.load(ep, spread)
        rows = tokens * k * load * etp
        product = self.compute.gemm(rows / local, f, d, local)
        experts = 2 * product + self.compute.gemm(rows / local, d, f, local)
        router = self._router(tokens)
        comm, comm_backward, moved = self.exchange_costs(ep, etp, tokens, load, dispatcher, experts)
        elementwise = self.compute.stream(b * (8 * tokens * d + moved)) + self.compute.stream(b * 3 * rows * f)
        waits = (not self.job.pad_to_capacity and ep * etp > 1) + (self.nodes(ep, etp, dispatcher) > 1)
        kernels = self.job.hardware.kernels
        sync = waits * (kernels.host_sync + _LAUNCHES["chunk"] * kernels.launch)
        decode = self._decode(3 * local * f * d)
        forward = {"experts": experts, "gemm": router, "elementwise": elementwise + decode, **comm}
        backward = {
            "experts": self._backward * experts,
            "gemm": self._backward * router,
            "elementwise": _ELEMENTWISE_BACKWARD * elementwise + decode,
            **comm_backward,
        }
        self._add_casts(forward, backward, rows, d + f, 2 * f + d)
        if sync:
            forward["launch"] = sync
        more = _LAUNCHES["chunk"] * (self.chunks(ep) - 1)
        repeated = {"experts": 2 * product, "feed norm": self._norm(tokens)}
        made = self._weights * (experts + router)
        return self._with_launches("experts", forward, backward, made, repeated, more)

    def _router(self, tokens: int) -> float:
        """Returns the seconds of the router's scores in fp32; never faster than reading the tokens."""
        model = self.model
        busy = 2 * tokens * model.hidden_size * model.num_experts / (self.job.hardware.peak("fp32") * 0.7)
        return max(busy, self.compute.stream(4 * tokens * (model.hidden_size + model.num_experts)))

    def _mlp(self, tp: int, cp: int, micro_batch: int, width: int, own_norm: bool) -> Block:
        """Computes a gated feed-forward block cut over tp: that of a dense layer, or the shared expert."""
        b, d = self.job.activation_bytes, self.model.hidden_size
        n, f = self.tokens(micro_batch, cp), ceil(width / tp)
        gemm = 2 * self.compute.gemm(n, f, d) + self.compute.gemm(n, d, f)
        elementwise = self.compute.stream(3 * b * n * f) + self.compute.stream(b * (5 if own_norm else 3) * n / tp * d)
        comm = self.links.reduce(self.shape(tp, 1), n * d * b)
        decode = self._decode(3 * d * f)
        forward = {"gemm": gemm, "elementwise": elementwise + decode, "tp": comm}
        backward = {
            "gemm": self._backward * gemm,
            "elementwise": _ELEMENTWISE_BACKWARD * elementwise + decode,
            "tp": comm,
        }
        self._add_casts(forward, backward, n, d + f, 2 * f + d)
        gather = self.links.gather(self.shape(tp, 1), n * d * b)
        norm = gather + (self._norm(n / tp) if own_norm else 0.0)
        return self._with_launches("mlp", forward, backward, self._weights * gemm, {"feed norm": norm})

    def _ends(self, tp: int, cp: int, micro_batch: int) -> tuple[Block, Block]:
        """Computes the ends of the model: the embedding; and the final norm, head and loss."""
        model, b = self.model, self.job.activation_bytes
        n, d, v = self.tokens(micro_batch, cp), model.hidden_size, ceil(model.vocab_size / tp)
        gather, scatter = (move(self.shape(tp, 1), n * d * b) for move in (self.links.gather, self.links.scatter))
        look_up = self.compute.stream(3 * b * n * d)
        back = {"head": 2 * look_up, "tp": gather} if self._weights else {}
        embedding = Block({"head": look_up, "tp": scatter}, back)
        gemm = self.compute.gemm(n, v, d)
        loss = self.compute.stream(n * v * (b + 3 * 4))  # logits are read once, and softmax runs in fp32
        back = {"head": self._backward * gemm + loss, "tp": scatter}
        head = Block({"head": gemm + loss, "tp": gather}, back, self._weights * gemm)
        return embedding, head

    def _add_casts(
        self, forward: dict[str, float], backward: dict[str, float], rows: float, inputs: int, outputs: int
    ) -> None:
        """Adds fp8 casts: inputs of products and gradients are read once and written twice, one copy transposed."""
        if self.job.dtype == "fp8":
            forward["elementwise"] += self.compute.stream((2 + 1 + 1) * rows * inputs)
            backward["elementwise"] += self.compute.stream((2 + 1 + 1) * rows * outputs)

    def _with_launches(
        self,
        kind: str,
        forward: dict[str, float],
        backward: dict[str, float],
        weight: float,
        again: Mapping[str, float],
        more: int = 0,
    ) -> Block:
        """Raises the time of a block to the time the host needs to launch its kernels, plus ``more`` launches."""
        floor = (_LAUNCHES[kind] + more) * self.job.hardware.kernels.launch
        for seconds, least in ((forward, floor), (backward, 2 * floor)):
            missing = least - sum(seconds.values())
            if missing > 0:
                seconds["launch"] = seconds.get("launch", 0.0) + missing
        half = {"attention": sum(forward.values())} if kind == "attention" else {}
        return Block(forward, backward, weight, {**again, **half})

    # ---- layers ------------------------------------------------------------------------------------------------

    def _layers(self, tp: int, cp: int, ep: int, etp: int, micro_batch: int, dispatcher: str) -> tuple[Block, Block]:
        """Computes a layer with experts and a dense layer."""
        model = self.model
        attention = self.attention(tp, cp, micro_batch)
        tokens = ceil(self.tokens(micro_batch, cp) / tp)
        parts = [(1.0, attention), (1.0, self.experts(ep, etp, tokens, dispatcher, tp * cp))]
        if model.shared_expert_intermediate_size:
            parts.append((1.0, self.mlp(tp, cp, micro_batch, model.shared_expert_intermediate_size, False)))
        moe = combine(parts)
        if self.num_moe == model.num_hidden_layers:
            return moe, moe
        return moe, combine([(1.0, attention), (1.0, self.mlp(tp, cp, micro_batch, model.intermediate_size, True))])

    def _whole(self, tp: int, cp: int, ep: int, etp: int, micro_batch: int, dispatchers: tuple[str, ...]) -> float:
        """Returns the seconds of all layers and the head for one micro-batch, under the fastest of some dispatchers."""
        if len(dispatchers) > 1:
            return min(self.whole(tp, cp, ep, etp, micro_batch, (name,)) for name in dispatchers)
        moe, dense = self.layers(tp, cp, ep, etp, micro_batch, dispatchers[0])
        _, head = self.ends(tp, cp, micro_batch)
        times = ((self.num_moe, moe), (self.model.num_hidden_layers - self.num_moe, dense), (1, head))
        return sum(number * (block.forward_total + block.backward_total) for number, block in times)
