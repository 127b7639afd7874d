# SPDX-License-Identifier: Apache-2.0
"""A network of the user's own in a pipeline: one call runs the whole schedule over the micro-batches.

The gradients of the load-balancing loss need the choices of the whole batch, of all its micro-batches, which are known only
after the schedule; and by how much the user weighs that loss is known later still. So asking for it runs the schedule once
more, with nothing but this loss.

Legend: R rows, M micro-batches, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.agreement import PRIME, check_same_batch, fingerprint, same_batch_slots
from lightning_moefold.errors import BatchError, InputError, InputTypeError, PeerError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.base import parallel_roots, wide
from lightning_moefold.parallel.network.protocol import LayeredNetwork
from lightning_moefold.parallel.network.row_cut import RowCut
from lightning_moefold.parallel.pipeline.engine import Kept, ScheduleRunner, Wire, differentiable
from lightning_moefold.parallel.pipeline.network_stage import LOSS, OUTPUT, RATIO, NetworkJob, NetworkStage, check_shape
from lightning_moefold.parallel.randomness import Randomness
from lightning_moefold.parallel.settings import Settings

_DIMENSIONS = 8
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NetworkPipeline:
    """Runs a network that is spread over pipeline ranks.

    Args:
        network: Cut down to what this rank holds.
        mesh: The folded mesh.
        settings: How it is cut and run.
        stages: Of this rank, in the order of the network.
        device: Where its parameters are.
    """

    def __init__(
        self, network: LayeredNetwork, mesh: FoldedMesh, settings: Settings, stages: list[NetworkStage],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.network, self.mesh, self.stages, self.device = network, mesh, stages, device
        self._settings = settings
        self._runner = ScheduleRunner(self, mesh, settings.plan, stages)
        self._shapes: dict[Any, Wire] = {}
        self._latest: tuple[NetworkJob, Randomness] | None = None

    def use(self, settings: Settings) -> None:
        """Goes on under other settings."""
        self._settings = settings
        self._runner.use(settings.plan)

    # ---- what the engine asks ----------------------------------------------------------------------------------

    def parameters(self) -> Iterable[nn.Parameter]:
        """On this rank."""
        return self.network.module.parameters()

    def modules(self) -> Iterable[nn.Module]:
        """On this rank."""
        return self.network.module.modules()

    def release_gathered_weights(self) -> None:
        """So that ``parameters`` are pieces."""
        for _, block in parallel_roots(self.network.module):
            block.release_gathered_weights()

    # ---- a call ------------------------------------------------------------------------------------------------

    def run(self, batch: Any) -> Tensor:
        """What the network returns for this data rank's rows. Collective over all ranks.

        Raises:
            BatchError: On every rank, if one has other data than the rest of its replica.
            Exception: What the user's code raised; on other ranks, that it did.
        """
        training = torch.is_grad_enabled()
        job = self._prepare(batch, training)
        self._latest = (job, Randomness(self.device))
        kept = self._run(job, training)
        kind, total, weight = self._results(job, training)
        output = self._output(job) if kind == OUTPUT else None
        job.found.clear()
        if output is not None:
            return output
        value = (total / weight).to(wide(job.wire.dtype))
        # A loss means the mean over data ranks (modules/balance.py); a ratio is a value of all of them.
        factor = 1.0 if kind == LOSS else self.mesh.fold.dp / float(weight)
        return differentiable(value, kept, factor) if training else value

    def _prepare(self, batch: Any, training: bool) -> NetworkJob:
        """Cuts the batch into micro-batches, once all ranks have agreed that their data is sound."""
        mesh, device = self.mesh, self.device
        enabled = torch.is_autocast_enabled(device.type)
        autocast = enabled, torch.get_autocast_dtype(device.type)
        error: Exception | None = None
        rows, wire = 1, Wire((1, 1), torch.float32)
        number = torch.full((), int(training) + 1, device=device)
        try:
            rows = _rows(batch)
            for tensor in _tensors(batch):
                number = (number * 31 + fingerprint(tensor).to(device)) % PRIME
            if any(stage.is_first for stage in self.stages):
                wire = self._shape(batch, rows, autocast)
        except Exception as failure:  # raised below, together with all ranks
            error = failure
        flags = torch.tensor([error is not None, rows < self._settings.num_microbatches], device=device)
        slots = torch.zeros(mesh.fold.dp, _DIMENSIONS + 1, dtype=torch.float64, device=device)
        if any(stage.is_first for stage in self.stages) and not mesh.tp.index and not mesh.axis("cp").index:
            numbers = [
                len(wire.shape),
                *wire.shape,
                *[0] * (_DIMENSIONS - 1 - len(wire.shape)),
                _DTYPES.index(wire.dtype),
            ]
            slots[mesh.place["dp"]] = torch.tensor(numbers, dtype=torch.float64)
        same = same_batch_slots(number, mesh)
        totals = comm.all_reduce_raw(torch.cat([flags.double(), same.flatten(), slots.flatten()]), mesh.world).cpu()
        flags, same, slots = totals.split([2, same.numel(), slots.numel()])
        if error is not None:
            raise error
        if flags[0]:
            raise BatchError("the batch of another rank cannot be read; that rank's own error says why.")
        check_same_batch(same, mesh)
        dimensions, *shape, dtype = (int(n) for n in slots.view(mesh.fold.dp, -1)[mesh.place["dp"]].tolist())
        # In a short last batch some micro-batches have no rows. A schedule needs all of them; an evaluation does not.
        m = 1 if flags[1] and not training else self._settings.num_microbatches
        bounds = [part.numel() for part in torch.arange(rows).tensor_split(m)]
        cut = RowCut.of(shape[:dimensions], mesh.axis("cp"), self._settings.exchange)
        inner = shape[1:dimensions] if cut is None else [cut.length, *shape[2:dimensions]]
        for block in self.network.blocks():
            block.rows = cut
        return NetworkJob(
            _cut(batch, rows, bounds), bounds, device, Wire((max(bounds), *inner), _DTYPES[dtype]), cut, autocast
        )

    def _shape(self, batch: Any, rows: int, autocast: tuple[bool, torch.dtype]) -> Wire:
        """Of the hidden states of one row, which all stages must know: as ``embed`` makes them of the first row."""
        key = (autocast, *((tuple(t.shape[int(t.dim() and t.shape[0] == rows) :]), t.dtype) for t in _tensors(batch)))
        if key not in self._shapes:
            with torch.no_grad(), Randomness(self.device).again():
                x_1 = self.network.embed(_cut(batch, rows, [1])[0])
            check_shape(x_1, (1, *x_1.shape[1:]))
            if x_1.dim() >= _DIMENSIONS or x_1.dtype not in _DTYPES:
                raise InputError(
                    f"embed returned {x_1.dtype} of {x_1.dim()} dimensions, which do not travel between stages."
                )
            RowCut.of(x_1.shape, self.mesh.axis("cp"))
            # Under autocast layers return what they like; what travels loses nothing.
            self._shapes[key] = Wire(tuple(x_1.shape), wide(x_1.dtype) if autocast[0] else x_1.dtype)
        return self._shapes[key]

    def _run(self, job: NetworkJob, training: bool) -> Kept:
        run = self._runner.train if training else self._runner.evaluate
        # Backward runs inside, where the user's autocast must not reach it; stages turn it on for their code.
        with torch.autocast(self.device.type, enabled=False):
            return run(job, len(job.batches), (job.wire,), self.device)

    # ---- what came of it ---------------------------------------------------------------------------------------

    def _results(self, job: NetworkJob, training: bool) -> tuple[int, Tensor, Tensor]:
        """Kind of the result, the sum and what to divide it by: the same bits on every rank of a data replica."""
        mesh = self.mesh
        kinds = {found.kind for found in job.found.values()}
        if len(kinds) > 1:
            job.error = job.error or TypeError(
                "head returned different kinds of results for the micro-batches of one batch."
            )
        slots = torch.zeros(mesh.fold.dp + 1, 3, dtype=torch.float64, device=self.device)
        if job.found and not mesh.tp.index and not mesh.axis("cp").index:
            share = {i: job.rows[i] / sum(job.rows) if f.kind == LOSS else 1.0 for i, f in job.found.items()}
            total = torch.stack([share[i] * f.total.double() for i, f in job.found.items()]).sum()
            weight = torch.stack([share[i] * f.weight.double() for i, f in job.found.items()]).sum()
            slots[mesh.place["dp"]] = torch.stack([slots.new_tensor(float(min(kinds))), total, weight])
        slots[-1, 0] = job.error is not None
        comm.all_reduce_raw(slots, mesh.world)
        if job.error is not None:
            raise job.error
        failed, kinds = bool(slots[-1, 0]), {int(kind) for kind in slots[:-1, 0].tolist()}
        if failed:
            raise PeerError("the network's code failed on another rank, whose own error says why.")
        if len(kinds) > 1:
            raise InputTypeError(
                "head returned different kinds of results on the data ranks; return the same kind on each."
            )
        [kind] = kinds
        if kind == OUTPUT and training:
            raise InputTypeError(
                "head returned a tensor with an entry for each row, through which a pipeline cannot go backward; return a loss, or "
                "call the network under torch.no_grad()."
            )
        if kind != RATIO:
            return kind, slots[mesh.place["dp"], 1], torch.ones_like(slots[0, 0])
        total, weight = slots[:-1, 1].sum(), slots[:-1, 2].sum()
        return kind, total, torch.where(weight == 0, torch.ones_like(weight), weight)

    def _output(self, job: NetworkJob) -> Tensor:
        """Of all micro-batches, on every rank of the pipeline."""
        pp, source = self.mesh.axis("pp"), self._runner.last_rank
        mine = [job.found[i].output for i in sorted(job.found)]
        whole = torch.cat([part for part in mine if part is not None]).contiguous() if mine else None
        about = [None if whole is None else (tuple(whole.shape), whole.dtype)]
        dist.broadcast_object_list(about, src=source, group=pp.group)
        assert about[0] is not None
        if whole is None:
            whole = torch.empty(about[0][0], dtype=about[0][1], device=self.device)
        as_sent = whole.view(torch.uint8) if whole.dtype == torch.bool else whole
        dist.broadcast(as_sent, src=source, group=pp.group)
        return whole

    # ---- the load-balancing loss -------------------------------------------------------------------------------

    def load_balancing_loss(self) -> Tensor:
        """Of the latest call, see :func:`~.modules.balance.load_balancing_loss`. Collective over all ranks.

        Raises:
            ValueError: On every rank, if no layer has kept its routing.
        """
        job, randomness = self._latest or (None, None)
        routed = {} if job is None else dict(sorted(job.routed.items()))
        flat = torch.cat(
            [torch.zeros(0, dtype=torch.float64, device=self.device), *(t.flatten() for t in routed.values())]
        )
        comm.all_reduce_raw(flat, self.mesh.stage)
        top_k = {name: k for stage in self.stages for name, k in stage.top_k.items()}
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
        assert job is not None
        assert randomness is not None
        loss = (value[0] / layers).to(wide(job.wire.dtype))
        if not torch.is_grad_enabled():
            return loss
        again = NetworkJob(
            job.batches,
            job.rows,
            job.device,
            job.wire,
            job.cut,
            job.autocast,
            {n: s / layers for n, s in slopes.items()},
        )
        for block in self.network.blocks():
            block.rows = job.cut
        with self._runner.counters_kept(), randomness.again():
            kept = self._run(again, training=True)
        if again.error is not None:
            raise again.error
        return differentiable(loss, kept, float(self.mesh.dp_cp.size))


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _rows(batch: Any) -> int:
    """Entries of the first tensor.

    Raises:
        BatchError: If there is none.
    """
    for tensor in _tensors(batch):
        if tensor.dim() and tensor.shape[0]:
            return tensor.shape[0]
        break
    raise BatchError(
        "a network in a pipeline needs a batch whose first tensor has an entry for each row, and at least one row."
    )


def _cut(batch: Any, rows: int, sizes: list[int]) -> list[Any]:
    """Tensors of ``rows`` rows in blocks, all else to everybody."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        apply_to_collection(
            batch, Tensor, lambda t, at=start, n=size: t[at : at + n] if t.dim() and t.shape[0] == rows else t
        )
        for start, size in zip(starts, sizes, strict=True)
    ]
