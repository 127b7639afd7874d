# SPDX-License-Identifier: Apache-2.0
"""Computes from sizes every collective that a fold requires in a training step, to be compared with :mod:`.scale`.

It covers ``bf16-mixed`` with ``data_parallel_sharding="optimizer"``, one row of a data rank per micro-batch, dropless
all-to-all dispatch and balanced routing. Bytes are those of the larger buffer on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family, ParameterLayout, TensorGradient
from lightning_moefold.modules.recompute_parts import LAYER, half_is_recomputed, recompute_parts
from lightning_moefold.modules.vocabulary import chunk_rows
from lightning_moefold.testing.rehearsal.expected_context import attention_messages
from lightning_moefold.testing.rehearsal.messages import Expected, Message
from lightning_moefold.testing.rehearsal.scale import Step

_HALF, _SINGLE, _DOUBLE = 2, 4, 8
#: Number of elements after which a bucket of gradients is summed.
_BUCKET = 16 * 1024 * 1024


def expected_messages(step: Step, fold: Fold, rank: int, layouts: Mapping[str, ParameterLayout]) -> list[Expected]:
    """Returns the collectives and messages of ``rank`` in a step.

    Args:
        step: The training step.
        fold: The fold.
        rank: The rank.
        layouts: Layouts of all parameters of the model, by name.

    Raises:
        ValueError: If rows would be padded.
    """
    pieces = fold.tp * (2 * fold.cp if fold.cp > 1 else 1)
    if step.sequence_length % pieces:
        raise InputError(
            f"sequence_length={step.sequence_length} does not divide into {pieces} pieces under fold {fold} and would be padded, "
            f"which is not foreseen here; use a multiple of {pieces}."
        )
    parts = _Parts(step, fold, rank)
    found = [*parts.layers(), *parts.ends(), *parts.stages(), *parts.agreements(), *parts.data_parallel(layouts)]
    return [e for e in found if len(e.message.ranks) > 1 and e.count]


class _Parts:
    """Yields the collectives of a step, part by part."""

    def __init__(self, step: Step, fold: Fold, rank: int) -> None:
        self.step, self.config, self.fold, self.rank = step, step.config, fold, rank
        self.place = fold.coordinates(rank)
        plan = step.plan
        count = fold.pp * plan.chunks if fold.pp > 1 else 1
        cut = plan.layers(self.config, fold.pp) if fold.pp > 1 else [range(self.config.num_hidden_layers)]
        mine = plan.local_stages(fold.pp, self.place["pp"]) if fold.pp > 1 else [0]
        self.stage_layers = {stage: cut[stage] for stage in mine}
        self.first, self.last, self.count = 0 in mine, count - 1 in mine, count
        # A pipeline calls its layers once per micro-batch; without one, all rows go through them at once.
        self.m, rows = (step.num_microbatches, 1) if fold.pp > 1 else (1, step.num_microbatches)
        self.rows, self.s = rows, rows * step.sequence_length // fold.cp
        # The last position of a row, on the first cp rank, predicts nothing.
        self.labels = self.s - rows * (self.place["cp"] == 0)
        self.t = self.s // fold.tp
        # Forward passes of the two halves of a layer, recomputation included, and gathers of a norm's output alone.
        parts = recompute_parts(step.recompute)
        self.attends = 1 + bool({LAYER, "attention"} & parts)
        self.feeds, self.dense_feeds = (1 + half_is_recomputed(parts, moe) for moe in (True, False))
        self.norms = "norm" in parts
        self.wants_routing = self.config.output_router_logits and self.config.num_moe_layers > 0

    def group(self, axis: str) -> tuple[int, ...]:
        """Returns this rank's group of an axis."""
        fold, stage = self.fold, self.fold.world_size // self.fold.pp
        if axis == "world":
            return tuple(range(fold.world_size))
        if axis == "stage":
            return tuple(range(self.rank // stage * stage, (self.rank // stage + 1) * stage))
        return tuple(next(group for group in fold.groups(axis) if self.rank in group))

    def _over(self, axis: str, purpose: str, kind: str, size: int, count: int) -> Expected:
        return Expected(purpose, axis, Message(kind, self.group(axis), size), count)

    def _there_and_back(
        self, purpose: str, size: int, gathers: int, scatters: int, forward: int = 1
    ) -> Iterator[Expected]:
        """Yields all-gathers and reduce-scatters over tp in each forward pass; in backward each becomes the other."""
        yield self._over("tp", purpose, "all-gather", size, gathers * forward + scatters)
        yield self._over("tp", purpose, "reduce-scatter", size, scatters * forward + gathers)

    def layers(self) -> Iterator[Expected]:
        """Yields collectives inside decoder layers."""
        config, fold = self.config, self.fold
        layers = [i for part in self.stage_layers.values() for i in part]
        moe, calls = sum(config.is_moe_layer(i) for i in layers), self.m * len(layers)
        tokens = self.s * config.hidden_size * _HALF
        yield from self._there_and_back("attention", tokens, calls, calls, self.attends)
        if self.norms and self.attends == 1:
            yield self._over("tp", "attention", "all-gather", tokens, calls)
        yield from attention_messages(self.step, fold, self.rank, self.group("cp"), self.rows, calls)
        shared, dense = self.m * moe * bool(config.shared_expert_intermediate_size), self.m * (len(layers) - moe)
        for wide, passes in ((shared, self.feeds), (dense, self.dense_feeds)):
            yield from self._there_and_back("shared expert, dense layer", tokens, wide, wide, passes)
            if self.norms and passes == 1:
                yield self._over("tp", "shared expert, dense layer", "all-gather", tokens, wide)
        rows = self.t * config.num_experts_per_tok
        sizes = (("rows", rows * config.hidden_size * _HALF, 1), ("router weights", rows * _SINGLE, 0))
        joint, calls = fold.etp * fold.ep, self.m * moe
        yield self._over(
            "etp_ep", "token counts", "all-gather", joint * config.num_experts * _DOUBLE, self.feeds * calls
        )
        # Rows travel to the experts and back, router weights only to the experts; in backward gradients go the other
        # way.
        for what, size, back in sizes:
            yield self._over("ep", what, "all-to-all", size, (1 + back) * (self.feeds + 1) * calls)
            yield self._over("etp", what, "all-gather", fold.etp * size, (self.feeds + back) * calls)
            yield self._over("etp", what, "reduce-scatter", fold.etp * size, (1 + back * self.feeds) * calls)

    def ends(self) -> Iterator[Expected]:
        """Yields collectives of the embedding, and of the head with its loss."""
        config, tokens = self.config, self.s * self.config.hidden_size * _HALF
        if self.first:
            yield from self._there_and_back("embedding", tokens, 0, self.m)
        if not self.last:
            return
        yield from self._there_and_back("head", tokens, self.m, 0)
        # Maximum, sum and target of each labelled position.
        chunk = chunk_rows(config.vocab_size, self.fold.tp, "cpu")
        for size, count in ((chunk, self.labels // chunk), (self.labels % chunk, int(self.labels % chunk > 0))):
            yield self._over("tp", "loss", "all-gather", self.fold.tp * 3 * size * _SINGLE, self.m * count)

    def stages(self) -> Iterator[Expected]:
        """Yields messages between pipeline stages: hidden states and routing tables forward, their gradients back."""
        pp = self.group("pp")
        sizes = [("hidden states", self.t * self.config.hidden_size * _HALF)]
        sizes += [("routing", 3 * self.config.num_experts * _DOUBLE)] * self.wants_routing
        for stage in self.stage_layers:
            for neighbour in (stage - 1, stage + 1):
                if not 0 <= neighbour < self.count:
                    continue
                other = pp[self.step.plan.owner(neighbour, self.fold.pp)]
                if other == self.rank:
                    continue
                for purpose, size in sizes:
                    yield Expected(purpose, "pp", Message("send", (self.rank, other), size), self.m)
                    yield Expected(purpose, "pp", Message("recv", (other, self.rank), size), self.m)

    def agreements(self) -> Iterator[Expected]:
        """Yields small reductions on which all ranks agree."""
        fold, experts = self.fold, self.config.num_experts
        if fold.pp > 1:
            yield self._over("world", "labels and faults", "all-reduce", (6 + self.m + 2 * fold.dp) * _DOUBLE, 1)
            yield self._over("world", "loss", "all-reduce", 5 * _DOUBLE, 1)
            if self.last and self.wants_routing:
                yield self._over("stage", "load balance", "all-reduce", experts * _DOUBLE, self.m)
        else:
            table = (2 * self.step.num_microbatches + 1) * experts * self.wants_routing
            numbers = 7 + table + 2 * fold.dp * (fold.tp * fold.cp > 1)
            yield self._over("stage", "loss and faults", "all-reduce", numbers * _DOUBLE, 1)
        yield self._over("world", "gradient norm", "all-reduce", 2 * _DOUBLE, 1)

    def data_parallel(self, layouts: Mapping[str, ParameterLayout]) -> Iterator[Expected]:
        """Yields FSDP2's gathers of weights and reductions of gradients, and the sum of partial gradients over tp."""
        units: dict[str, list[ParameterLayout]] = {}
        partial: list[int] = []
        for name, layout in layouts.items():
            if layout.pp_ranks is not None and self.place["pp"] not in layout.pp_ranks:
                continue
            units.setdefault(self._unit(name), []).append(layout)
            if layout.plan.family is Family.DENSE and layout.plan.gradient is TensorGradient.PARTIAL:
                partial.append(layout.stored_box(self.fold, self.rank).numel)
        for unit, members in units.items():
            axis = members[0].data_axis
            padded = sum(self._padded(layout) for layout in members)
            gathered = _SINGLE if unit.endswith(".gate") else _HALF  # the router computes in float32
            yield self._over(axis, f"weights of {_kind(unit)}", "all-gather", padded * gathered, 1)
            yield self._over(axis, f"gradients of {_kind(unit)}", "reduce-scatter", padded * _SINGLE, 1)
        for numbers in _buckets(partial):
            yield self._over("tp", "partial gradients", "all-reduce", numbers * _SINGLE, 1)

    def _unit(self, name: str) -> str:
        """Returns the name of the FSDP2 module that gathers a parameter."""
        parts = name.split(".")
        if "layers" not in parts:
            stage = 0 if "embed_tokens" in parts or self.count == 1 else self.count - 1
            return f"ends of stage {stage}"
        layer = ".".join(parts[:3])
        if ".mlp.experts." in name:
            return f"{layer}.experts"
        return f"{layer}.gate" if name.endswith(".mlp.gate.weight") else layer

    def _padded(self, layout: ParameterLayout) -> int:
        """Returns the elements of a tp or ep shard, padded so that all data ranks have equally many."""
        sizes, dim = list(layout.tensor_box(self.place).sizes), layout.data_dim or 0
        ranks = self.fold.size(layout.data_axis)
        sizes[dim] = -(-sizes[dim] // ranks) * ranks
        return math.prod(sizes)


def _kind(unit: str) -> str:
    if unit.startswith("ends"):
        return "embedding and head"
    return {"experts": "experts", "gate": "routers"}.get(unit.rpartition(".")[2], "layers")


def _buckets(numbers: list[int]) -> Iterator[int]:
    """Yields the number of flags and elements of each bucket of partial gradients."""
    flags = size = 0
    for elements in numbers:
        flags, size = flags + 1, size + elements
        if size >= _BUCKET:
            yield flags + size
            flags = size = 0
    if flags:
        yield flags + size
