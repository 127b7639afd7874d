# SPDX-License-Identifier: Apache-2.0
"""A custom network in a pipeline: its own code in ``embed`` and ``head``, its layers between them.

A short last batch leaves micro-batches without rows. Such a one runs through the layers only, because their blocks communicate.

The gradients of the load-balancing loss need the choices of all micro-batches, which are known only after the schedule, and the
user's coefficient is known only in backward. So that loss gets a schedule of its own, which runs when it is asked for.

Legend: R rows of a micro-batch, C rows of the largest, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.agreement import PRIME, fingerprint
from lightning_moefold.errors import BatchError, InputError, InputTypeError
from lightning_moefold.layout import even_split
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.base import wide
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.routers import Router
from lightning_moefold.modules.routers.statistics import split_table
from lightning_moefold.parallel.network.position_check import check_positions
from lightning_moefold.parallel.network.protocol import LOSS, OUTPUT, RATIO, LayeredNetwork, check_shape, read_head
from lightning_moefold.parallel.network.row_cut import RowCut, tell_blocks
from lightning_moefold.parallel.pipeline.engine import Kept, ScheduleRunner, Wire, differentiable
from lightning_moefold.parallel.pipeline.pipeline import Pipeline
from lightning_moefold.parallel.pipeline.stage import Call, Carried, Objective, Stage, Staged, cut_rows
from lightning_moefold.parallel.randomness import Randomness
from lightning_moefold.parallel.settings import Settings

_DIMENSIONS = 8
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(kw_only=True)
class NetworkCall(Call):
    """One call of the network; its micro-batches are known once all ranks have agreed.

    Args:
        batch: As it was given.
        settings: How the network runs.
        autocast: Whether the user's code runs under autocast, and in which dtype.
        rows: Of the whole batch; the ``lengths`` are R of each micro-batch.
        wire: A row of the hidden states as it travels, ``[1, ...]``; known only to the first stage until ``agree``.
        cut: How rows are cut over cp; None where they are whole.
        slopes: For the load-balancing loss alone: by what each layer's probabilities ``[E]`` are weighed.

    Attributes:
        kinds: What the head returned for the micro-batches.
        routed: Choices and probabilities ``[2, E]`` of each layer that keeps its routing, over all micro-batches.
    """

    batch: Any
    settings: Settings
    autocast: tuple[bool, torch.dtype]
    rows: int = 1
    wire: Wire = Wire((1, 1), torch.float32)
    cut: RowCut | None = None
    slopes: dict[str, Tensor] | None = None
    kinds: set[int] = field(default_factory=set)
    routed: dict[str, Tensor] = field(default_factory=dict)

    def around(self) -> AbstractContextManager[Any]:
        """The user's autocast."""
        enabled, dtype = self.autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


class StagedNetwork(Staged[NetworkCall]):
    """A custom network in stages, cut down to what this rank holds."""

    users_code = "the network's code"

    def __init__(self, network: LayeredNetwork, mesh: FoldedMesh, device: torch.device) -> None:
        self.network, self.module, self.mesh, self.device = network, network.module, mesh, device
        self._shapes: dict[Any, Wire] = {}
        self._tried: set[int] = set()
        self._keeping: dict[int, dict[str, MoELayer]] = {}
        self._latest: tuple[NetworkCall, _Drawn] | None = None

    @property
    @override
    def layers(self) -> Mapping[str, nn.Module]:
        return self.network.layers()

    @override
    def ends(self, *, first: bool, last: bool) -> nn.Module:
        # Nobody says which parameters embed uses, and which head.
        ends = (p for m in self.network.ends() for p in m.parameters(recurse=False))
        return nn.ParameterList(dict.fromkeys(ends) if first or last else ())

    # ---- before the schedule -----------------------------------------------------------------------------------

    @override
    def read(self, batch: Any, settings: Settings) -> NetworkCall:
        """Reads what the network was called with, which ``embed`` and ``head`` take."""
        training, device = torch.is_grad_enabled(), self.device
        call = NetworkCall(
            batches=[], device=device, training=training, number=torch.full((), int(training) + 1, device=device), batch=batch,
            settings=settings, autocast=(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        )  # fmt: skip
        try:
            call.rows = _rows(batch)
            for tensor in _tensors(batch):
                call.number = (call.number * 31 + fingerprint(tensor).to(device)) % PRIME
            if self.mesh.place["pp"] == 0:
                call.wire = self._shape(call)
        except Exception as failure:  # raised together with all ranks
            call.fault = failure
        return call

    def _shape(self, call: NetworkCall) -> Wire:
        """Of the hidden states of one row, which all stages must know: as ``embed`` makes them of the first row."""
        tensors, rows, autocast = _tensors(call.batch), call.rows, call.autocast
        key = (autocast, *((tuple(t.shape[int(t.dim() and t.shape[0] == rows) :]), t.dtype) for t in tensors))
        if key not in self._shapes:
            with torch.no_grad(), Randomness(self.device).again():
                x_1 = self.network.embed(cut_rows(call.batch, rows, [1])[0])
            check_shape(x_1, (1, *x_1.shape[1:]))
            if x_1.dim() >= _DIMENSIONS or x_1.dtype not in _DTYPES:
                raise InputError(
                    f"embed returned {x_1.dtype} of {x_1.dim()} dimensions, which do not travel between stages."
                )
            RowCut.of(x_1.shape, self.mesh.axis("cp"))
            # Under autocast layers return what they like; what travels loses nothing.
            self._shapes[key] = Wire(tuple(x_1.shape), wide(x_1.dtype) if autocast[0] else x_1.dtype)
        return self._shapes[key]

    @override
    def numbers(self, call: NetworkCall) -> Tensor:
        # Whether there are fewer rows than micro-batches; shape and dtype of the hidden states of each data rank.
        few = torch.tensor([call.rows < call.settings.num_microbatches], dtype=torch.float64, device=self.device)
        slots = torch.zeros(self.mesh.fold.dp, _DIMENSIONS + 1, dtype=torch.float64, device=self.device)
        if self.mesh.place["pp"] == 0 and self._is_first_of_stage:
            shape = call.wire.shape
            padding = [0] * (_DIMENSIONS - 1 - len(shape))
            numbers = [len(shape), *shape, *padding, _DTYPES.index(call.wire.dtype)]
            slots[self.mesh.place["dp"]] = torch.tensor(numbers, dtype=torch.float64)
        return torch.cat([few, slots.flatten()])

    @override
    def agree(self, call: NetworkCall, totals: Tensor) -> None:
        few, slots = totals.tensor_split([1])
        dimensions, *shape, dtype = (int(n) for n in slots.view(self.mesh.fold.dp, -1)[self.mesh.place["dp"]].tolist())
        # In a short last batch some micro-batches have no rows. A schedule needs all of them; an evaluation does not.
        m = 1 if bool(few) and not call.training else call.settings.num_microbatches
        call.lengths = list(even_split(call.rows, m))
        call.batches = cut_rows(call.batch, call.rows, call.lengths)
        call.cut = RowCut.of(shape[:dimensions], self.mesh.axis("cp"), call.settings.exchange)
        inner = shape[1:dimensions] if call.cut is None else [call.cut.length, *shape[2:dimensions]]
        call.wires = (Wire((max(call.lengths), *inner), _DTYPES[dtype]),)
        tell_blocks(self.network.blocks(), call.cut)
        self._latest = call, _Drawn(self.module, self.device)

    @property
    def _is_first_of_stage(self) -> bool:
        """Of the ranks that have the same rows."""
        return not self.mesh.tp.index and not self.mesh.axis("cp").index

    # ---- in the schedule ---------------------------------------------------------------------------------------

    @override
    def embed(self, call: NetworkCall, number: int) -> Carried:
        # Zeros, where the user's code fails.
        [wire], cut = call.wires, call.cut
        length = () if cut is None else (cut.true_length,)
        expected = (call.lengths[number], *length, *wire.shape[1 + len(length) :])
        x_R = torch.zeros(expected, dtype=wire.dtype, device=call.device)
        if call.lengths[number]:
            with call.keeping_errors():
                made = self.network.embed(call.batches[number])
                check_shape(made, expected)
                x_R = made
        return (x_R if cut is None else cut.enter(x_R),)

    @override
    def run(self, stage: Stage, carried: Carried, call: NetworkCall, number: int) -> Carried:
        # Layers may change in place what they are given.
        x_R = carried[0] if stage.is_first else carried[0].clone()
        if call.cut is not None and stage.index not in self._tried:
            layers = dict(zip(stage.names, stage.layers, strict=True))
            if (wrong := check_positions(layers, x_R, call.cut, self.mesh.stage)) is not None:
                call.error = call.error or wrong
                return (x_R,)
            self._tried.add(stage.index)
        y_R = x_R
        # Helps if all ranks of the stage raise; if one does, its peers wait until the timeout.
        with call.keeping_errors():
            for layer in stage.layers:
                y_R = layer(y_R)
            if y_R.shape != x_R.shape:
                raise InputError(
                    f"layers must return hidden states of the shape that they take in a pipeline; {list(x_R.shape)} became "
                    f"{list(y_R.shape)}."
                )
            share = self._routing(stage, call)
            if share is None:
                return (y_R,)
            return (y_R, share) if stage.is_last else (_Beside.apply(y_R, share),)
        return (x_R,)

    def _routing(self, stage: Stage, call: NetworkCall) -> Tensor | None:
        """Takes what the layers have kept: adds it up or, for the load-balancing loss, forms this rank's share of it."""
        share = None
        for name, layer in self._routers(stage).items():
            kept, layer.routing = layer.routing, None
            if kept is None:
                continue
            counts_GE, probability_GE, _ = split_table(kept.table_SE)
            probability_E = probability_GE[0].double()
            if call.slopes is not None:
                part = (call.slopes[name] * probability_E).sum()
                share = part if share is None else share + part
            else:
                mine = torch.stack([counts_GE[0].double(), probability_E]).detach()
                call.routed[name] = call.routed[name] + mine if name in call.routed else mine
        return share

    def _routers(self, stage: Stage) -> dict[str, MoELayer]:
        """The layers of a stage that keep their routing."""
        if stage.index not in self._keeping:
            self._keeping[stage.index] = {
                f"{name}.{inner}": part
                for name, layer in zip(stage.names, stage.layers, strict=True)
                for inner, part in layer.named_modules()
                if isinstance(part, MoELayer) and part.keep_routing
            }
        return self._keeping[stage.index]

    @override
    def head(self, carried: Carried, call: NetworkCall, number: int) -> Objective:
        # Where only the load-balancing loss is asked for, there is nothing but this stage's share of it.
        x_R = carried[0] if call.cut is None else call.cut.leave(carried[0])
        objective = sum(carried[1:], torch.zeros((), dtype=torch.float64, device=call.device))
        if call.slopes is None and call.lengths[number]:
            with call.keeping_errors():
                found = read_head(self.network.head(x_R, call.batches[number]), call.lengths[number])
                # Losses are means over rows.
                share = call.lengths[number] / call.rows if found.kind == LOSS else 1.0
                total = share * found.total.double()
                objective = objective + total
                call.kinds.add(found.kind)
                call.note(number, total, share * found.weight.double())
                if found.output is not None:
                    call.outputs[number] = found.output.detach()
        return Objective(objective, x_R)

    # ---- after the schedule ------------------------------------------------------------------------------------

    @override
    def found(self, call: NetworkCall) -> Tensor:
        # Kind of the result, the sum and what to divide it by, of each data rank.
        if len(call.kinds) > 1:
            call.error = call.error or TypeError(
                "head returned different kinds of results for the micro-batches of one batch."
            )
        slots = torch.zeros(self.mesh.fold.dp, 3, dtype=torch.float64, device=self.device)
        if call.sums and self._is_first_of_stage:
            slots[self.mesh.place["dp"], 0] = float(min(call.kinds))
            slots[self.mesh.place["dp"], 1:] = torch.stack(list(call.sums.values())).sum(0)
        return slots.flatten()

    @override
    def finish(self, call: NetworkCall, totals: Tensor, kept: Kept, runner: ScheduleRunner) -> Tensor:
        kind, total, weight = self._result(call, totals.view(self.mesh.fold.dp, 3))
        if kind == OUTPUT:
            whole = call.output()
            call.outputs.clear()  # the call is kept for the load-balancing loss
            return runner.from_last(whole, None, self.device)
        value = (total / weight).to(wide(call.wires[0].dtype))
        # A loss means the mean over data ranks (modules/balance.py); a ratio is a value of all of them.
        factor = 1.0 if kind == LOSS else self.mesh.fold.dp / float(weight)
        return differentiable(value, kept, factor) if call.training else value

    def _result(self, call: NetworkCall, slots: Tensor) -> tuple[int, Tensor, Tensor]:
        """Kind of the result, the sum and what to divide it by."""
        kinds = {int(kind) for kind in slots[:, 0].tolist()}
        if len(kinds) > 1:
            raise InputTypeError(
                "head returned different kinds of results on the data ranks; return the same kind on each."
            )
        [kind] = kinds
        if kind == OUTPUT and call.training:
            raise InputTypeError(
                "head returned a tensor with an entry for each row, through which a pipeline cannot go backward; return a loss, or "
                "call the network under torch.no_grad()."
            )
        if kind != RATIO:
            return kind, slots[self.mesh.place["dp"], 1], torch.ones_like(slots[0, 0])
        total, weight = slots[:, 1].sum(), slots[:, 2].sum()
        return kind, total, torch.where(weight == 0, torch.ones_like(weight), weight)

    # ---- the load-balancing loss -------------------------------------------------------------------------------

    def load_balancing_loss(self, pipeline: Pipeline) -> Tensor:
        """Of the latest call, see :func:`~.modules.balance.load_balancing_loss`. Collective over all ranks.

        Raises:
            InputError: On every rank, if no layer has kept its routing.
        """
        call, drawn = self._latest or (None, None)
        routed = {} if call is None else dict(sorted(call.routed.items()))
        none = torch.zeros(0, dtype=torch.float64, device=self.device)
        flat = comm.all_reduce_raw(torch.cat([none, *(t.flatten() for t in routed.values())]), self.mesh.stage)
        top_k = {name: part.top_k for stage in pipeline.stages for name, part in self._routers(stage).items()}
        slopes, value = {}, torch.zeros(2, dtype=torch.float64, device=self.device)
        for (name, mine), total in zip(routed.items(), flat.split([t.numel() for t in routed.values()]), strict=True):
            counts_E, probability_E = total.view_as(mine).unbind(0)
            tokens = (counts_E.sum() / top_k[name]).clamp(min=1)
            slopes[name] = counts_E / tokens.square() * len(counts_E)
            value += torch.stack([(slopes[name] * probability_E).sum(), torch.ones_like(tokens)])
        comm.all_reduce_raw(value, self.mesh.axis("pp"))
        layers = float(value[1])
        if not layers:
            raise InputError(
                "no MoE layer has kept its routing; make layers with keep_routing=True and run the network in training mode first."
            )
        assert call is not None
        assert drawn is not None
        loss = (value[0] / layers).to(wide(call.wires[0].dtype))
        if not torch.is_grad_enabled():
            return loss
        again = replace(call, slopes={name: slope / layers for name, slope in slopes.items()})
        tell_blocks(self.network.blocks(), again.cut)
        with pipeline.runner.counters_kept(), drawn.again():
            kept = pipeline.schedule(again, training=True)
        if again.error is not None:
            raise again.error
        return differentiable(loss, kept, float(self.mesh.dp_cp.size))


class _Drawn:
    """What a call of the network is to draw: generators, and the calls that routers make their noise of."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._randomness = Randomness(device)
        calls = (m.call for m in network.modules() if isinstance(m, Router))
        self._calls = [(call, call.clone()) for call in calls if call is not None]

    def again(self) -> AbstractContextManager[None]:
        """A context in which it is drawn once more; for use in ``counters_kept``, which sets calls of routers back."""
        for call, then in self._calls:
            call.copy_(then)
        return self._randomness.again()


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _rows(batch: Any) -> int:
    """Entries of the first tensor.

    Raises:
        BatchError: If there is none.
    """
    first = next(iter(_tensors(batch)), None)
    if first is not None and first.dim() and first.shape[0]:
        return first.shape[0]
    raise BatchError(
        "a network in a pipeline needs a batch whose first tensor has an entry for each row, and at least one row."
    )


class _Beside(torch.autograd.Function):
    """Hidden states, with a scalar whose gradient is one."""

    @staticmethod
    def forward(ctx: Any, x_R: Tensor, share: Tensor) -> Tensor:
        ctx.like = share.new_ones(())
        return x_R.view_as(x_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like
