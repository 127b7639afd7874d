# SPDX-License-Identifier: Apache-2.0
"""One pipeline stage, which runs its layers on one micro-batch at a time, and what it asks of the network they belong to.

From stage to stage travel the hidden states, padded to the longest micro-batch since a schedule wants one shape, and the
small tensors that a network sends beside them. The language model (:mod:`.language_model`) and custom networks
(:mod:`.network`) say what is embedded, run and read off at the end; all else they have in common is here and in
:mod:`.pipeline`.

Legend: T entries of this micro-batch, C of the longest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.parallel.pipeline.engine import Kept, ScheduleRunner, Wire

#: What travels between the layers of a micro-batch: the hidden states, then what a network has beside them.
Carried = tuple[Tensor, ...]


@dataclass(kw_only=True)
class Call:
    """One call of a network: its micro-batches, and what has come of it so far.

    Args:
        batches: The micro-batches, as the network understands them.
        device: Of the tensors.
        training: Whether backward runs, too.
        number: Fingerprint of this rank's arguments, below :data:`~.agreement.PRIME`; on the device.
        fault: Why the batch cannot be read, or None; all ranks agree on it before the schedule.
        may_fail: Whether code of the user's runs in the schedule.
        looks_ahead: Whether the loss needs numbers of all micro-batches, which then run forward once more before the schedule.

    Attributes:
        lengths: T of each micro-batch.
        wires: What travels; the hidden states first, ``[C, ...]``.
        sums: Of each micro-batch, the sum of losses on this data rank and what to divide it by.
        outputs: Of each micro-batch, where they are kept.
        error: What the user's code raised first, which is raised together with all ranks after the schedule.
    """

    batches: list[Any]
    device: torch.device
    training: bool
    number: Tensor
    fault: Exception | None = None
    may_fail: bool = True
    looks_ahead: bool = False
    lengths: list[int] = field(default_factory=list)
    wires: tuple[Wire, ...] = ()
    sums: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    error: Exception | None = None

    def around(self) -> AbstractContextManager[Any]:
        """Returns a context for the stages, such as the user's autocast; the schedule itself is outside of it."""
        return nullcontext()

    def note(self, number: int, total: Tensor, weight: Tensor) -> None:
        """Notes the sum of losses of a micro-batch and what to divide it by."""
        self.sums[number] = torch.stack([total.detach().double(), weight.detach().double()])

    def output(self) -> Tensor | None:
        """Returns the outputs of all micro-batches together."""
        return torch.cat([self.outputs[i] for i in sorted(self.outputs)]) if self.outputs else None

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Keeps the first error of the user's code: a rank that raised in the schedule would leave the others waiting in it."""
        try:
            yield
        except Exception as failure:
            self.error = self.error or failure


C = TypeVar("C", bound=Call)


class Objective(NamedTuple):
    """What the last stage makes of a micro-batch.

    Args:
        value: What is differentiated; scalar, float64.
        end: The tensor from which backward begins, times zero, if the value does not require a gradient.
        reaches_end: Whether the value was computed from it.
    """

    value: Tensor
    end: Tensor
    reaches_end: bool = True


class Staged(ABC, Generic[C]):
    """A network in stages: what a pipeline asks of it, in the order of a call.

    Attributes:
        module: The network, cut down to what this rank holds.
        users_code: Name, for error messages, of the user's code that runs in the schedule.
    """

    module: nn.Module
    users_code: str

    @property
    @abstractmethod
    def layers(self) -> Mapping[str, nn.Module]:
        """The layers of this rank, by name."""

    @abstractmethod
    def ends(self, *, first: bool, last: bool) -> nn.Module:
        """Returns what a stage at either end computes with besides its layers: modules, or their parameters alone."""

    @abstractmethod
    def read(self, *args: Any, **kwargs: Any) -> C:
        """Reads the arguments of a call, and keeps what is wrong with them, since all ranks have to agree on it."""

    @abstractmethod
    def numbers(self, call: C) -> Tensor:
        """Returns the numbers that all ranks add up before the schedule: float64, of one length on every rank."""

    @abstractmethod
    def agree(self, call: C, totals: Tensor) -> None:
        """Takes the sums of :meth:`numbers`, on the CPU, and completes the call; what it raises, all ranks raise."""

    @abstractmethod
    def embed(self, call: C, number: int) -> Carried:
        """Makes the hidden states of a micro-batch, and what travels beside them."""

    @abstractmethod
    def run(self, stage: Stage, carried: Carried, call: C, number: int) -> Carried:
        """Runs the layers of a stage."""

    @abstractmethod
    def head(self, carried: Carried, call: C, number: int) -> Objective:
        """Computes what is differentiated from the output of the last layer."""

    def evaluated(self, call: C) -> None:
        """Sums up what all micro-batches did in a forward pass without backward. Collective over a stage."""
        return

    @abstractmethod
    def found(self, call: C) -> Tensor:
        """Returns the numbers that all ranks add up after the schedule: float64, of one length on every rank."""

    def looked(self, call: C, totals: Tensor) -> None:
        """Takes the sums of :meth:`found` after the first pass of a call that looks ahead."""
        return

    @abstractmethod
    def finish(self, call: C, totals: Tensor, kept: Kept, runner: ScheduleRunner) -> Any:
        """Makes the result of a call, from the sums of :meth:`found` and the gradients that the schedule made."""


class Stage(nn.Module):
    """Some layers of a network, with what comes before the first and after the last.

    Shares its modules with the network; ``fully_shard`` may wrap it, because every stage gathers and reduces on its own.
    """

    def __init__(self, network: Staged[Any], index: int, count: int, names: Sequence[str]) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == count - 1
        self.names = list(names)
        self.layers = nn.ModuleList(network.layers[name] for name in names)
        # Schedules that split backward look for weights among the parameters of the stage.
        self.ends = network.ends(first=self.is_first, last=self.is_last)
        self.call: Call | None = None
        self._network = (network,)  # not registered: the network is not a part of its stages

    def units(self) -> list[nn.Module]:
        """The modules whose dense weights are gathered together, inner ones first."""
        return [*self.layers, self]

    def forward(self, *received: Tensor, microbatch: Tensor) -> Tensor | Carried:
        """Runs the micro-batch of a number, ``[1]`` on the CPU, on what the stage before has sent.

        Returns:
            What the next stage receives; on the last stage, the scalar to be differentiated.
        """
        assert self.call is not None
        call, number, [network] = self.call, int(microbatch), self._network
        with call.around():
            if self.is_first:
                carried = network.embed(call, number)
            else:  # what travels beside is a tensor of its own even where no layer adds to it
                carried = received[0][: call.lengths[number]], *(beside + 0.0 for beside in received[1:])
            carried = network.run(self, carried, call, number)
            if self.is_last:
                return _scalar(network.head(carried, call, number))
        x_T, *beside = carried
        wire = call.wires[0]
        # A copy even without padding: a stage on the same rank detaches in place what it receives.
        x_C = F.pad(x_T.to(wire.dtype), [0, 0] * (x_T.dim() - 1) + [0, wire.shape[0] - x_T.shape[0]]).contiguous()
        if torch.is_grad_enabled() and not x_C.requires_grad:
            # Where all is frozen so far, pipelining still wants something to run backward from.
            x_C = x_C + torch.zeros((), dtype=x_C.dtype, device=x_C.device, requires_grad=True)
        return x_C, *beside


def _scalar(objective: Objective) -> Tensor:
    value, end, reaches_end = objective
    if torch.is_grad_enabled() and not (reaches_end and value.requires_grad):
        # The user's code failed or returned a constant, or there are no rows: the gradients are zero, but every rank takes
        # part in those of all layers.
        value = value + 0 * end.sum().double()
    return value


def cut_rows(values: Any, rows: int, sizes: Sequence[int]) -> list[Any]:
    """A collection in micro-batches of these sizes: tensors of ``rows`` rows in blocks, all else to everybody."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        apply_to_collection(
            values, Tensor, lambda t, at=start, n=size: t[at : at + n] if t.dim() and t.shape[0] == rows else t
        )
        for start, size in zip(starts, sizes, strict=True)
    ]
