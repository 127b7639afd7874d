# SPDX-License-Identifier: Apache-2.0
"""PipelineTimeline: records when each pipeline rank runs which pass, in one training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.callbacks.common import log_file
from lightning_moefold.checkpoint import stores
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.parallel.pipeline.engine import ScheduleRunner
from lightning_moefold.parallel.pipeline.pipeline import Pipeline
from lightning_moefold.planner.cost.simulate import Event, Op, Timeline, chrome_trace
from lightning_moefold.plots.files import PIPELINE_TIMELINE

#: Methods of torch's stages that run a pass, and the kind of pass.
_PASSES = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}


class PipelineTimeline(pl.Callback):
    """Records the forward and backward passes of every stage in one optimizer step, for ``moefold plot``.

    The pipeline of the first data replica is written to ``pipeline_timeline.json`` in the Trainer's ``log_dir``, as a
    Chrome trace (it opens in ``chrome://tracing`` and Perfetto). Gaps between passes are waits, mostly for other
    stages. There is one collective over pp after that step; other steps cost nothing.

    Args:
        step: The optimizer step to record, counted from 1; the first steps are slow.

    Attributes:
        timeline: The recorded timeline, on the ranks of each pipeline; None before the step, and without a pipeline.

    Raises:
        ValueError: If ``step`` is not positive.
    """

    def __init__(self, step: int = 4) -> None:
        super().__init__()
        if step < 1:
            raise InputError(f"step={step} must be at least 1, the first optimizer step.")
        self.step = step
        self.timeline: Timeline | None = None
        self._recorder: TimelineRecorder | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        models = [m for m in pl_module.modules() if isinstance(m, MoECausalLM) and isinstance(m.pipeline, Pipeline)]
        if not models:
            rank_zero_warn("PipelineTimeline found no model with a pipeline and has nothing to record.")
            return
        assert isinstance(models[0].pipeline, Pipeline)
        self._recorder = TimelineRecorder(models[0].pipeline.runner)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._recorder is not None and self.timeline is None and trainer.global_step == self.step - 1:
            self._recorder.start()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._recorder is None or not self._recorder.recording:
            return
        self.timeline = self._recorder.finish()
        path = log_file(trainer, PIPELINE_TIMELINE)
        if trainer.is_global_zero and path is not None:
            stores.write(path, chrome_trace(self.timeline).encode())


class TimelineRecorder:
    """Records when each pass of a pipeline's stages begins and ends.

    On CPU it reads the clock; on CUDA it uses events in the stream, since the host runs ahead of the device. Ranks are
    aligned by the time of day, on which the machines of a cluster agree to about a millisecond.

    Args:
        runner: The runner of this rank's stages.
    """

    def __init__(self, runner: ScheduleRunner) -> None:
        self.runner = runner
        self.recording = False
        self._mesh: FoldedMesh = runner.mesh
        self._passes: list[tuple[Op, Any, Any]] = []
        self._origin: Any = None

    def start(self) -> None:
        """Starts to record. Every rank of the pipeline must call this."""
        self.recording, self._passes, self._origin = True, [], None
        self.runner.watch = self._watch

    def finish(self) -> Timeline:
        """Stops, and merges the records of this pipeline's ranks. Collective over pp."""
        self.runner.watch, self.recording = nullcontext, False
        pp = self._mesh.axis("pp")
        mine = [(op, self._seconds(start), self._seconds(end)) for op, start, end in self._passes]
        everyone = comm.all_gather_objects(mine, pp)
        first = min((start for passes in everyone for _, start, _ in passes), default=0.0)
        events = [
            Event(rank, op, start - first, end - first)
            for rank, passes in enumerate(everyone)
            for op, start, end in passes
        ]
        return Timeline(tuple(events), pp.size)

    @contextmanager
    def _watch(self, schedule: Any) -> Iterator[None]:
        stages = getattr(schedule, "_stages", None) or [schedule._stage]
        for stage in stages:
            for name in _PASSES:
                setattr(stage, name, self._timed(stage, name))
        if self._on_cuda and self._origin is None:
            torch.cuda.synchronize()
            self._origin = self._now(), time.time()
        try:
            yield
        finally:
            for stage in stages:
                for name in _PASSES:
                    delattr(stage, name)  # uncovers the method of its class

    def _timed(self, stage: Any, name: str) -> Callable[..., Any]:
        function, kind = getattr(stage, name), _PASSES[name]

        def run(number: int, *args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = function(number, *args, **kwargs)
            self._passes.append(((kind, stage.stage_index, number), start, self._now()))
            return result

        return run

    @property
    def _on_cuda(self) -> bool:
        return self._mesh.device_type == "cuda"

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        if not self._on_cuda:
            return moment
        moment.synchronize()
        event, seconds = self._origin
        return seconds + event.elapsed_time(moment) / 1e3
