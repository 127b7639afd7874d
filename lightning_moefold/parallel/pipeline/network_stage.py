# SPDX-License-Identifier: Apache-2.0
"""What one pipeline stage of a network of the user's own computes: its layers, on one micro-batch at a time.

From stage to stage travel the hidden states, padded to as many rows as the largest micro-batch has. The user's code may
fail in ``embed`` and in ``head``; what it raised is kept and the schedule goes on with zeros, or the other stages would
wait forever. Of a micro-batch without rows, which a short last batch leaves, only the layers hear, whose blocks communicate.

Legend: R rows of a micro-batch, C rows of the largest, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.errors import InputError, InputTypeError
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.routers.statistics import split_table
from lightning_moefold.parallel.network.position_check import check_positions
from lightning_moefold.parallel.network.protocol import LayeredNetwork
from lightning_moefold.parallel.network.row_cut import RowCut
from lightning_moefold.parallel.pipeline.engine import Wire

#: What a head returned.
LOSS, RATIO, OUTPUT = 1, 2, 3


class Found(NamedTuple):
    """What the head said of a micro-batch.

    Args:
        kind: :data:`LOSS`, :data:`RATIO` or :data:`OUTPUT`.
        total: The loss, or the sum of losses; zero for an output.
        weight: What sums are divided by; one for the rest.
        output: An output.
    """

    kind: int
    total: Tensor
    weight: Tensor
    output: Tensor | None = None

    def detached(self) -> Found:
        """Without its graph."""
        output = None if self.output is None else self.output.detach()
        return Found(self.kind, self.total.detach(), self.weight.detach(), output)


@dataclass
class NetworkJob:
    """One call of the network.

    Args:
        batches: The micro-batches.
        rows: R of each.
        device: Of the tensors.
        wire: The hidden states as they travel, ``[C, ...]``.
        cut: How rows are cut over cp; None where they are whole.
        autocast: Whether the user's code runs under autocast, and in which dtype.
        slopes: For the load-balancing loss alone: by what each layer's probabilities ``[E]`` are weighed.

    Attributes:
        found: What the head returned for each micro-batch, without its graph.
        routed: Choices and probabilities ``[2, E]`` of each layer that keeps its routing, over all micro-batches.
        error: What the user's code raised.
    """

    batches: list[Any]
    rows: list[int]
    device: torch.device
    wire: Wire
    cut: RowCut | None
    autocast: tuple[bool, torch.dtype]
    slopes: dict[str, Tensor] | None = None
    found: dict[int, Found] = field(default_factory=dict)
    routed: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


class NetworkStage(nn.Module):
    """Some layers of a network, with ``embed`` before the first and ``head`` after the last.

    Shares its modules with the network; ``fully_shard`` may wrap it.

    Args:
        network: Cut down to what this pipeline rank holds.
        index: Of the stage.
        count: Stages in all.
        names: Of its layers.
        axis: The ranks of the stage.
    """

    def __init__(self, network: LayeredNetwork, index: int, count: int, names: list[str], axis: Axis) -> None:
        super().__init__()
        self._axis = axis
        self.index, self.is_first, self.is_last = index, index == 0, index == count - 1
        layers = network.layers()
        self.layers = nn.ModuleList(layers[name] for name in names)
        ends = (p for m in network.ends() for p in m.parameters(recurse=False))
        # Schedules that split backward look for weights among the parameters of the stage.
        self.ends = nn.ParameterList(dict.fromkeys(ends) if self.is_first or self.is_last else ())
        self.job: NetworkJob | None = None
        self._names, self._tried = names, False
        self._network = (network,)  # not registered: the network is not a part of its stages
        self._routers = {
            f"{name}.{inner}": m
            for name in names
            for inner, m in layers[name].named_modules()
            if isinstance(m, MoELayer) and m.keep_routing
        }

    @property
    def top_k(self) -> dict[str, int]:
        """Experts per token in each layer that keeps its routing."""
        return {name: layer.top_k for name, layer in self._routers.items()}

    def forward(self, *received: Tensor, microbatch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs one micro-batch.

        Args:
            received: From the stage before: hidden states ``[C, ...]``.
            microbatch: Its number, ``[1]`` on the CPU.

        Returns:
            What the next stage receives; on the last stage, the scalar to be differentiated.
        """
        assert self.job is not None
        job, number = self.job, int(microbatch)
        (enabled, dtype), device = job.autocast, job.device.type
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            # A tensor of the layers' own, which they may change in place.
            x_R = received[0][: job.rows[number]].clone() if received else self._embed(job, number)
            x_R, share = self._run_layers(x_R, job)
            if self.is_last:
                return self._finish(x_R, share, job, number)
        x_C = F.pad(x_R.to(job.wire.dtype), [0, 0] * (x_R.dim() - 1) + [0, job.wire.shape[0] - x_R.shape[0]])
        x_C = x_C.contiguous()  # to be sent
        if share is not None:
            x_C = _Beside.apply(x_C, share)
        if torch.is_grad_enabled() and not x_C.requires_grad:
            # Where all is frozen so far, pipelining still wants something to run backward from.
            x_C = x_C + torch.zeros((), dtype=x_C.dtype, device=x_C.device, requires_grad=True)
        return (x_C,)

    def _embed(self, job: NetworkJob, number: int) -> Tensor:
        length = () if job.cut is None else (job.cut.true_length,)
        expected = (job.rows[number], *length, *job.wire.shape[1 + len(length) :])
        x_R = torch.zeros(expected, dtype=job.wire.dtype, device=job.device)
        try:
            if job.rows[number]:
                x_R = self._network[0].embed(job.batches[number])
                check_shape(x_R, expected)
        except Exception as failure:  # raised after the schedule, together with all ranks
            job.error = job.error or failure
            x_R = torch.zeros(expected, dtype=job.wire.dtype, device=job.device)
        return x_R if job.cut is None else job.cut.enter(x_R)

    def _run_layers(self, x_R: Tensor, job: NetworkJob) -> tuple[Tensor, Tensor | None]:
        if job.cut is not None and not self._tried:
            layers = dict(zip(self._names, self.layers, strict=True))
            if (wrong := check_positions(layers, x_R, job.cut, self._axis)) is not None:
                job.error = job.error or wrong
                return x_R, None
            self._tried = True
        y_R = x_R
        try:
            for layer in self.layers:
                y_R = layer(y_R)
            if y_R.shape != x_R.shape:
                raise InputError(
                    f"layers must return hidden states of the shape that they take in a pipeline; {list(x_R.shape)} became "
                    f"{list(y_R.shape)}."
                )
        except Exception as failure:  # if it is that of all ranks of the stage; otherwise the others wait for this one
            job.error = job.error or failure
            return x_R, None
        return y_R, self._routing(job)

    def _routing(self, job: NetworkJob) -> Tensor | None:
        """Takes what the layers have kept: adds it up or, for the load-balancing loss, forms this rank's share of it."""
        share = None
        for name, layer in self._routers.items():
            kept, layer.routing = layer.routing, None
            if kept is None:
                continue
            counts_GE, probability_GE, _ = split_table(kept.table_SE)
            probability_E = probability_GE[0].double()
            if job.slopes is not None:
                part = (job.slopes[name] * probability_E).sum()
                share = part if share is None else share + part
            else:
                mine = torch.stack([counts_GE[0].double(), probability_E]).detach()
                job.routed[name] = job.routed[name] + mine if name in job.routed else mine
        return share

    # ---- the last stage ----------------------------------------------------------------------------------------

    def _finish(self, x_R: Tensor, share: Tensor | None, job: NetworkJob, number: int) -> Tensor:
        if job.cut is not None:
            x_R = job.cut.leave(x_R)
        objective = torch.zeros((), dtype=torch.float64, device=job.device)
        if share is not None:
            objective = objective + share
        elif job.slopes is None and job.rows[number]:
            try:
                found = read_head(self._network[0].head(x_R, job.batches[number]), job.rows[number])
            except Exception as failure:  # raised after the schedule, together with all ranks
                job.error = job.error or failure
            else:
                part = job.rows[number] / sum(job.rows) if found.kind == LOSS else 1.0
                objective = objective + part * found.total.double()
                job.found[number] = found.detached()
        if torch.is_grad_enabled() and not objective.requires_grad:
            # The head failed or returned a constant: the gradients are zero, but every rank takes part in them.
            objective = objective + 0 * x_R.sum().double()
        return objective


def check_shape(x_R: Any, expected: tuple[int, ...]) -> None:
    """Raises a ValueError unless ``embed`` returned hidden states of this shape."""
    if not isinstance(x_R, Tensor) or tuple(x_R.shape) != expected:
        what = list(x_R.shape) if isinstance(x_R, Tensor) else type(x_R).__name__
        raise InputError(
            f"embed must return hidden states with an entry for each row of the batch, of one shape: {list(expected)} here, "
            f"not {what}."
        )


def is_ratio(result: Any) -> bool:
    """Whether a head returned a sum of losses and what to divide it by."""
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    return pair and isinstance(result[0], Tensor) and result[0].dim() == 0


def read_head(result: Any, rows: int) -> Found:
    """Makes out what a head returned for ``rows`` rows.

    Raises:
        TypeError: If that is nothing a pipeline can put together again.
    """
    if isinstance(result, Tensor) and result.dim() == 0:
        return Found(LOSS, result, result.new_ones(()))
    if is_ratio(result):
        return Found(RATIO, result[0], torch.as_tensor(result[1], dtype=torch.float64, device=result[0].device))
    if isinstance(result, Tensor) and result.shape[0] == rows:
        return Found(OUTPUT, torch.zeros((), device=result.device), torch.ones((), device=result.device), result)
    what = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise InputTypeError(
        "head must return a loss (a scalar, the mean over rows), a pair (sum, weight) of scalars or, in evaluation, a tensor with "
        f"an entry for each row; it returned {what} for {rows} rows."
    )


class _Beside(torch.autograd.Function):
    """Hidden states, with a scalar whose gradient is one."""

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, share: Tensor) -> Tensor:
        ctx.like = share.new_ones(())
        return x_C.clone(
            memory_format=torch.contiguous_format
        )  # no view: a stage on the same rank detaches it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like
