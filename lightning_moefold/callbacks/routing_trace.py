# SPDX-License-Identifier: Apache-2.0
"""RoutingTraceRecorder: records how often each rank's tokens chose each expert, step by step, for ``moefold balance``.

Legend: N records, L MoE layers, S source ranks (of one pipeline stage), E experts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.agreement import agreeing
from lightning_moefold.balance.trace import RoutingTrace, read_trace
from lightning_moefold.callbacks.common import LogSchedule, save_arrays, world_axis
from lightning_moefold.callbacks.expert_load import LoadRow, find_rows
from lightning_moefold.checkpoint import stores
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.experts import Experts
from lightning_moefold.plots.files import ROUTING_TRACE
from lightning_moefold.strategy import MoEFoldStrategy


class RoutingTraceRecorder(pl.Callback):
    """Records how tokens are routed in training, without padding.

    A record holds the choices of one optimizer step, summed over its batches and micro-batches: ``counts`` ``[N, L, S,
    E]`` in
    the smallest unsigned type that holds them, ``iterations`` ``[N]``, and the sizes ``hidden_size`` and ``expert_width`` of the
    experts. The file is written atomically with every checkpoint and at the end of training. A run that resumes from a
    checkpoint continues the file of the run that wrote it, up to that checkpoint's step.

    Layers count on the device; there is one collective per record and no other. Other readers of the same counters,
    such as LoadBalanceMonitor, may be used in the same run.

    Args:
        every_n_steps: Record every n-th optimizer step.
        path: File to write, with a name that ends in ``.npz``; by default ``routing_trace.npz`` in the Trainer's
            ``log_dir``.

    Attributes:
        records: Optimizer step and counts ``[L, S, E]`` of each record; on rank zero only.

    Raises:
        InputError: If ``every_n_steps`` is not positive, or ``path`` does not end in ``.npz``.
    """

    def __init__(self, every_n_steps: int = 10, path: str | Path | None = None) -> None:
        super().__init__()
        if path is not None and not str(path).endswith(".npz"):
            raise InputError(f"path={str(path)!r} of RoutingTraceRecorder must end in .npz.")
        if every_n_steps < 1:
            raise InputError(f"every_n_steps={every_n_steps} of RoutingTraceRecorder must be at least 1.")
        self.path = path
        self.records: list[tuple[int, NDArray[np.int64]]] = []
        self._schedule = LogSchedule(every_n_steps)
        self._before: str | None = None  # file of the run that this one resumes
        self._target: Path | str | None = None
        self._world: Axis | None = None
        self._rows: list[LoadRow] = []
        self._sources = 1
        self._seen: list[Tensor] = []
        self._step: list[Tensor] = []

    # ---- the run -----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._world = world_axis(trainer)
        self._rows = find_rows(pl_module, self._world)
        if not self._rows:
            raise InputError("RoutingTraceRecorder found no MoELayer in the module; leave it out.")
        if len(experts := sorted({row.num_experts for row in self._rows})) > 1:
            raise InputError(
                f"RoutingTraceRecorder records layers with the same number of experts, and this model has {experts}; leave it out."
            )
        # pp is outermost: neighbours are of one stage
        stages = trainer.strategy.fold.pp if isinstance(trainer.strategy, MoEFoldStrategy) else 1
        self._sources = self._world.size // stages
        folder = trainer.log_dir  # asks rank zero: every rank has to call it
        here = None if folder is None else stores.join(stores.parse_path(folder), ROUTING_TRACE)
        path = self.path or here
        if path is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError("RoutingTraceRecorder needs a path, as this Trainer has no logger and so no folder.")
        self._target = None if path is None else stores.parse_path(path)
        with agreeing(self._world, InputError):
            if trainer.is_global_zero:
                self.records = self._earlier(trainer.global_step)
        self._schedule.start(trainer)
        self._seen = [layer.load_E.clone() for layer in self._layers()]
        self._step = [torch.zeros_like(seen_E) for seen_E in self._seen]

    def _layers(self) -> list[Any]:
        return [row.module for row in self._rows if row.module is not None]

    @torch.no_grad()
    def _count(self) -> None:
        """Adds what was counted since the last call; less than nothing where a step was taken back (:class:`.NonFiniteGuard`)."""
        for layer, seen_E, step_E in zip(self._layers(), self._seen, self._step, strict=True):
            load_E = layer.load_E
            step_E += load_E - seen_E
            seen_E.copy_(load_E)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._count()
        if not self._schedule.step_ended(trainer):
            return
        if self._schedule.is_due(trainer):
            counts_LSE = self._gather(trainer)
            if trainer.is_global_zero:
                self.records.append((trainer.global_step, counts_LSE))
        for step_E in self._step:
            step_E.zero_()

    @torch.no_grad()
    def _gather(self, trainer: pl.Trainer) -> NDArray[np.int64]:
        """Every rank's counts of the step. One collective; waits for the device."""
        assert self._world is not None
        shape = (len(self._rows), self._sources, self._rows[0].num_experts)
        table_LSE = torch.zeros(shape, dtype=torch.int64, device=trainer.strategy.root_device)
        here = [i for i, row in enumerate(self._rows) if row.module is not None]
        for i, step_E in zip(here, self._step, strict=True):
            table_LSE[i, self._world.index % self._sources] = step_E.clamp(min=0)  # less if a counter was reset
        return comm.all_reduce_raw(table_LSE, self._world).cpu().numpy()

    # ---- the file ----------------------------------------------------------------------------------------------

    def _write(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if not trainer.is_global_zero or not self.records or self._target is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        counts = np.stack([counts_LSE for _, counts_LSE in self.records])
        arrays = {
            "iterations": np.array([step for step, _ in self.records], dtype=np.int64),
            "counts": counts.astype(np.min_scalar_type(int(counts.max()))),
        }
        save_arrays(self._target, {**arrays, **_sizes(self._layers())})

    on_train_end = on_save_checkpoint = _write

    def _earlier(self, step: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Returns the records up to ``step``, of this object or of the run that it resumes."""
        kept = [record for record in self.records if record[0] <= step]
        if kept or self._before is None or step == 0:
            return kept
        try:
            with tempfile.TemporaryDirectory() as folder:
                trace: RoutingTrace = read_trace(_local_copy(self._before, folder))
        except InputError as error:
            rank_zero_warn(f"RoutingTraceRecorder begins a new trace: {error}")
            return []
        if (trace.layers, trace.experts) != (len(self._rows), self._rows[0].num_experts):
            raise InputError(
                f"{self._before} has {trace.layers} layers of {trace.experts} experts and this model {len(self._rows)} of "
                f"{self._rows[0].num_experts}; give RoutingTraceRecorder another path."
            )
        trace = trace.for_sources(self._sources)
        pairs = zip(trace.iterations_N.tolist(), trace.counts_NLSE, strict=True)
        return [(iteration, counts_LSE) for iteration, counts_LSE in pairs if iteration <= step]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"path": None if self._target is None else str(self._target)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["path"]


def _local_copy(path: str, folder: str) -> str | Path:
    """Returns the path of a trace, or of its copy in ``folder`` if it is in a store."""
    place = stores.parse_path(path)
    if isinstance(place, Path) or not stores.is_file(place):
        return path
    copy = Path(folder, ROUTING_TRACE)
    copy.write_bytes(stores.read(place))
    return copy


def _sizes(layers: list[Any]) -> dict[str, int]:
    """Returns the sizes of the experts, if they are gated experts of equal width."""
    if not layers or not isinstance(layers[0].experts, Experts):
        return {}
    return {"hidden_size": layers[0].hidden_size, "expert_width": layers[0].experts.ffn_hidden_size}
