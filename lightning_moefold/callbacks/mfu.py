# SPDX-License-Identifier: Apache-2.0
"""MFUMonitor: logs model FLOPs utilisation (MFU), tokens per second and memory.

    MFU = model FLOPs of the global batch / (step time * sum of the ranks' peaks)

Model FLOPs are defined in :mod:`.work` (PaLM, arXiv 2204.02311, appendix B). HFU is the same with hardware FLOPs. Ranks
that share a batch (tp, cp, pp) count its tokens once.

Legend: W ranks, K columns.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.callbacks.common import LogSchedule, log_values, world_axis
from lightning_moefold.callbacks.memory import read_memory
from lightning_moefold.callbacks.peaks import compute_dtype, cuda_peak_flops, measured_peak_flops
from lightning_moefold.callbacks.stopwatch import CudaClock, HostClock, Span, Stopwatch
from lightning_moefold.callbacks.work import UNKNOWN, BatchShape, TokenCount, WorkModel
from lightning_moefold.errors import InputError


@dataclass
class Step:
    """One optimizer step on this rank: its time spans and its batches."""

    spans: list[Span]
    batches: list[BatchShape | None]


class MFUMonitor(pl.Callback):
    """Logs model FLOPs utilisation, throughput, step time and memory, the same values on every rank.

    It logs, at log steps: ``train/mfu`` (0..1), ``train/tokens_per_second``, ``train/tokens_per_second_per_device``,
    ``train/tflops_per_device`` (model TFLOP/s), ``train/step_time`` (seconds), memory of the fullest rank in units of
    10^9 bytes (below), and ``train/grad_norm`` (before clipping; ``_dense`` and ``_expert`` of each family) if the
    strategy clips gradients. ``train/hfu``, hardware FLOPs utilisation, is logged if it differs from the MFU: if
    products are recomputed. Unknown values are not logged: MFU without a peak or without model
    FLOPs, tokens without ``input_ids``.

    ``train/memory_allocated_gb`` is what tensors hold at the log step, ``train/memory_peak_gb`` the most they have ever
    held, ``train/memory_reserved_gb`` what torch's allocator has taken from the GPU. On CPU the first two are the
    resident size of the process, and the third is not logged.

    Step time is wall-clock time from one optimizer step to the next, data loading included, averaged over ``window``
    steps; the longest time of any rank counts. On CUDA it is marked by events on the stream that are read only at log
    time. The time from the start of a validation, a checkpoint or an epoch's end to the start of the next training
    batch is left out, and so is the sanity check, which runs before the first batch.

    Model FLOPs are three times those of forward for the experts a token visits and causal attention at the rows'
    length, less the gradients that frozen parameters make unnecessary; an adapter's own products count. Hardware FLOPs
    also count what is recomputed in backward. The peak is the dense one of the
    device for the Trainer's precision, times the ranks. On CPU there is no datasheet: a matrix product in the same
    dtype is measured at the start of training, on all ranks at the same time.

    There is one collective at the start of training, one at each log step (a few numbers per rank), and none per batch.
    With pipeline stages there is one more at the start, and two after parameters are frozen or unfrozen.

    Args:
        log_every_n_steps: Number of optimizer steps between logs; by default the Trainer's. If the Trainer does not log
            at such a step, the values reach its loggers at the next step at which it does.
        peak_flops: Peak of one device in FLOP/s, which replaces the table or the measurement.
        window: Maximum number of optimizer steps to average over.
        warmup_steps: Number of first optimizer steps of a fit that are left out, because they allocate, compile and
            connect.
        count_padding: Whether positions that ``attention_mask`` excludes count as tokens and as work. By default they
            do not, because under this strategy padding visits no expert.
        token_count_fn: ``token_count_fn(batch) -> (rows, length)`` for batches without ``input_ids`` ``[rows,
            length]``. Without this function, a row of packed documents counts as one sequence.
        clock: Function that returns the time in seconds; it replaces ``time.perf_counter`` or CUDA events.

    Attributes:
        latest: The latest logged values by name.
        peak: Sum of all ranks' peaks in FLOP/s, set when training starts; NaN if unknown.

    Raises:
        ValueError: If an argument is too small; the message names it.
    """

    def __init__(
        self,
        log_every_n_steps: int | None = None,
        peak_flops: float | None = None,
        window: int = 20,
        warmup_steps: int = 1,
        count_padding: bool = False,
        token_count_fn: TokenCount | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        if window < 1 or warmup_steps < 0 or (peak_flops is not None and peak_flops <= 0):
            raise InputError(
                f"window={window} must be at least 1, warmup_steps={warmup_steps} at least 0, and "
                f"peak_flops={peak_flops} positive."
            )
        self.peak_flops, self.window, self.warmup_steps = peak_flops, window, warmup_steps
        self.count_padding, self.token_count_fn, self.clock = count_padding, token_count_fn, clock
        self.latest: dict[str, float] = {}
        self.peak = UNKNOWN
        self._schedule = LogSchedule(log_every_n_steps)
        self._stopwatch: Stopwatch | None = None

    # ---- a fit ---------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.latest = {}
        self._steps: deque[Step] = deque(maxlen=self.window)
        self._batches: list[BatchShape | None] = []
        self._warmup_left = self.warmup_steps
        self._saved_at: list[Any] = []
        self._axis = world_axis(trainer)
        self._device = trainer.strategy.root_device if self._axis.size > 1 else torch.device("cpu")
        self._work = WorkModel(pl_module, self.token_count_fn, self.count_padding)
        self._schedule.start(trainer)
        self.peak = self._total_peak(trainer)
        self._work.share_frozen(self._axis)
        device = trainer.strategy.root_device
        on_gpu = self.clock is None and device.type == "cuda"
        self._stopwatch = Stopwatch(CudaClock(device) if on_gpu else HostClock(self.clock or time.perf_counter))
        if not self._work.knows_flops:
            rank_zero_warn(
                "MFUMonitor does not know how many FLOPs this module computes, so it logs no MFU; give the module the attribute "
                "flops_per_token or flops_per_batch."
            )

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._stopwatch is not None:
            self._skip_saves(trainer)
            self._stopwatch.resume()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._stopwatch is not None
        self._saved_at = _latest_saves(trainer)
        self._batches.append(self._work.read(batch))
        if not self._schedule.step_ended(trainer):
            return
        step, self._batches = Step(self._stopwatch.lap(), self._batches), []
        if self._warmup_left:
            self._warmup_left -= 1
        else:
            self._steps.append(step)
        if self._schedule.is_due(trainer):
            self.latest = self._figures(trainer)
            log_values(trainer, pl_module, self.latest)

    def _pause(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Pauses the stopwatch until the next training batch begins."""
        if self._stopwatch is not None:
            self._skip_saves(trainer)
            self._stopwatch.pause()

    on_validation_start = on_train_epoch_end = on_save_checkpoint = _pause

    def _skip_saves(self, trainer: pl.Trainer) -> None:
        """Leaves out the time since the step if a checkpoint of weights only was saved in it, which no hook announces."""
        assert self._stopwatch is not None
        if self._saved_at != _latest_saves(trainer):
            self._stopwatch.skip()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stopwatch = None
        if not self.latest:
            self._schedule.explain_silence(trainer, self)

    # ---- figures -------------------------------------------------------------------------------------------------

    def _figures(self, trainer: pl.Trainer) -> dict[str, float]:
        figures = {}
        if self._steps:
            table_WK = self._table(trainer)
            if table_WK[:, -1].any():  # a stage has frozen or unfrozen parameters, which changes the work of all ranks
                self._work.share_frozen(self._axis)
                table_WK = self._table(trainer)
            figures = summarize(table_WK, _data_share(trainer), len(self._steps), self.peak)
        precision: Any = trainer.precision_plugin
        norm = getattr(precision, "grad_norm", None)
        if isinstance(norm, Tensor):
            dense, expert = precision.grad_norm_by_family.tolist()
            figures |= {
                "train/grad_norm": float(norm),
                "train/grad_norm_dense": dense,
                "train/grad_norm_expert": expert,
            }
        return figures

    def _table(self, trainer: pl.Trainer) -> Tensor:
        """Gathers each rank's row as ``[W, K]`` on the host. Collective."""
        row = self._measure(trainer.strategy.root_device)
        mine_1K = torch.tensor([row], dtype=torch.float64, device=self._device)
        return comm.all_gather_raw(mine_1K, self._axis).cpu()

    def _measure(self, device: torch.device) -> list[float]:
        """Returns this rank's row: seconds, tokens, FLOPs of the window, bytes of memory, whether freezing has changed."""
        assert self._stopwatch is not None
        seconds = self._stopwatch.clock.seconds([span for step in self._steps for span in step.spans])
        work = self._work.count(batch for step in self._steps for batch in step.batches)
        news = float(self._work.frozen_has_changed)
        return [seconds, work.tokens, work.flops, work.hardware_flops, *astuple(read_memory(device)), news]

    def _total_peak(self, trainer: pl.Trainer) -> float:
        """Sums the ranks' peaks in FLOP/s; NaN if one is unknown. Collective."""
        measured = self.peak_flops is None and trainer.strategy.root_device.type != "cuda" and self._work.knows_flops
        if measured:
            trainer.strategy.barrier("peak")  # ranks share cores and memory, so all measure at the same time
        mine = torch.tensor([self._device_peak(trainer)], dtype=torch.float64, device=self._device)
        total = float(comm.all_reduce_raw(mine, self._axis))
        if measured:
            rank_zero_info(
                f"MFUMonitor: {self._axis.size} CPU rank(s) together measured {total / 1e9:.1f} GFLOP/s in products of "
                f"{compute_dtype(str(trainer.precision))} matrices; MFU is relative to that."
            )
        return total

    def _device_peak(self, trainer: pl.Trainer) -> float:
        """Returns the peak of this rank's device in FLOP/s; NaN if it is unknown."""
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        if self.peak_flops is not None:
            return self.peak_flops
        if device.type != "cuda":
            return measured_peak_flops(compute_dtype(precision)) if self._work.knows_flops else UNKNOWN
        peak = cuda_peak_flops(device, precision)
        if peak is None:
            rank_zero_warn(
                f"MFUMonitor knows no peak of {torch.cuda.get_device_name(device)!r} for precision={precision!r}, so "
                "MFU is not logged; pass peak_flops, the dense peak of one device in FLOP/s."
            )
            return UNKNOWN
        return peak


def summarize(table_WK: Tensor, data_share: float, steps: int, peak: float) -> dict[str, float]:
    """Computes the values to log from each rank's row.

    Args:
        table_WK: Seconds, tokens, model FLOPs, hardware FLOPs, and bytes allocated, reserved and at the peak, of each
            rank; NaN if unknown. Further columns are ignored.
        data_share: Number of data replicas divided by number of ranks, so that a batch that several ranks share counts
            once.
        steps: Number of optimizer steps that the rows cover.
        peak: Sum of all ranks' peaks in FLOP/s; NaN if unknown.

    Returns:
        The values by log name, without those that are unknown or not finite.
    """
    world = table_WK.shape[0]
    seconds = float(table_WK[:, 0].max())
    tokens, flops, hardware_flops = (table_WK[:, 1:4].sum(0) * data_share).tolist()
    allocated, reserved, peak_bytes = (table_WK[:, 4:7].amax(0) / 1e9).tolist()
    rate = 1 / seconds if seconds > 0 else UNKNOWN
    figures = {
        "train/mfu": flops * rate / peak,
        "train/hfu": hardware_flops * rate / peak if hardware_flops != flops else UNKNOWN,
        "train/tokens_per_second": tokens * rate,
        "train/tokens_per_second_per_device": tokens * rate / world,
        "train/tflops_per_device": flops * rate / world / 1e12,
        "train/step_time": seconds / steps,
        "train/memory_allocated_gb": allocated,
        "train/memory_reserved_gb": reserved,
        "train/memory_peak_gb": peak_bytes,
    }
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _data_share(trainer: pl.Trainer) -> float:
    """Returns the number of data replicas per rank: 1 for plain data parallelism, 1 / (tp * cp * pp) under a fold."""
    sampler = trainer.distributed_sampler_kwargs
    return 1.0 if sampler is None else sampler["num_replicas"] / trainer.world_size


def _latest_saves(trainer: pl.Trainer) -> list[Any]:
    """Returns the step of each checkpoint callback's latest save. The attribute is private to Lightning and may be missing."""
    return [getattr(callback, "_last_global_step_saved", None) for callback in trainer.checkpoint_callbacks]
