# SPDX-License-Identifier: Apache-2.0
"""Gated experts of uneven widths, as pruning leaves them: flat stacks with a row for each channel.

Row j of expert e is row j of its gate and of its up projection, and *column* j of its down projection. The channels of expert 0
come first, then those of expert 1, and so on. An expert may have no channel at all; its output is then zero.

Legend: A tokens, M rows in expert order, E experts, L local experts, D hidden size, F width of one expert, W channels of all
experts, w of local ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.errors import FoldError, InputError
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Cut, Family, ParameterPlan, TensorGradient
from lightning_moefold.mesh import SINGLE
from lightning_moefold.modules.base import local
from lightning_moefold.modules.experts.buckets import Buckets, in_buckets, make_buckets
from lightning_moefold.modules.experts.experts import WEIGHTS, RoutedExperts
from lightning_moefold.modules.experts.kernels import ExpertKernel, read_tokens, sum_rows
from lightning_moefold.modules.experts.products import grouped_never_waits, host_counts
from lightning_moefold.modules.experts.stack import split_stack
from lightning_moefold.modules.mlp import ACTIVATIONS


class PackedExperts(RoutedExperts):
    """E gated experts ``down(act(gate(x)) * up(x))`` of their own widths: one after the other, or in :mod:`.buckets`.

    Experts spread over ep as always, E / ep on each rank, so the ranks hold different numbers of channels. A width is not cut
    over etp.

    Args:
        hidden_size: D.
        widths: Width of each expert, 0 or more.
        activation: A name in :data:`~.mlp.ACTIVATIONS`.

    Attributes:
        kernel: ``"loop"``, ``"grouped_mm"`` (buckets), or ``"auto"``: buckets where grouped products are one kernel.
    """

    kernel: ExpertKernel = "auto"
    plan = ParameterPlan(Family.EXPERT, flat=True)

    def __init__(self, hidden_size: int, widths: Sequence[int], activation: str = "silu") -> None:
        super().__init__(len(widths))
        self.widths, self.activation = tuple(widths), ACTIVATIONS[activation]
        self._starts: list[int] = [0]
        for name in WEIGHTS:
            self.register_parameter(name, nn.Parameter(torch.empty(sum(widths), hidden_size)))
            nn.init.normal_(self.get_parameter(name), std=0.02)

    @property
    def ffn_hidden_size(self) -> int:
        """Mean width, for records of how much work an expert is."""
        return sum(self.widths) // self.num_experts

    def check_number(self, num_experts: int) -> None:
        """Raises InputError unless there is a width for each expert of a layer."""
        if num_experts != len(self.widths):
            raise InputError(f"ffn_hidden_size holds {len(self.widths)} widths for num_experts={num_experts}.")

    def check_kernel(self, kernel: ExpertKernel) -> None:
        """Raises InputError for a kernel that needs experts of one width."""
        if kernel not in ("auto", "loop", "grouped_mm"):
            raise InputError(f"expert_kernel={kernel!r} needs experts of one width; use 'auto' for a packed model.")

    def check_copies(self) -> None:
        """See :meth:`RoutedExperts.check_copies`."""
        raise InputError("expert_copies need experts of one width; leave them out for a packed model.")

    def bound_to_place(self, hidden_size: int) -> str | None:
        """See :meth:`RoutedExperts.bound_to_place`."""
        return "the experts of a packed model have uneven widths"

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Experts over ep."""
        self.check(fold)
        if fold.etp > 1:
            raise FoldError(f"etp={fold.etp} would cut experts of uneven widths, which stay whole; use etp=1.")
        channels = tuple(sum(part) for part in self._parts(fold.ep))
        plan = ParameterPlan(Family.EXPERT, (Cut("ep", 0, channels),), TensorGradient.SHARDED, flat=True)
        return dict.fromkeys(WEIGHTS, plan)

    def _parts(self, ep: int) -> list[tuple[int, ...]]:
        """Returns the widths of the experts of each ep rank."""
        each = self.num_experts // ep
        return [self.widths[first : first + each] for first in range(0, self.num_experts, each)]

    @property
    def _local_widths(self) -> tuple[int, ...]:
        ep = SINGLE if self.mesh is None else self.mesh.ep
        return self._parts(ep.size)[ep.index]

    def stacks(self) -> tuple[Tensor, ...]:
        """Gate, up and down, ``[w, D]`` each."""
        return tuple(local(self.get_parameter(name)) for name in WEIGHTS)

    def split(self, stack: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """See :meth:`RoutedExperts.split`."""
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._starts = [0, *ends[:-1]]
        widths = self._local_widths
        return split_stack(stack, [sum(widths[a:b]) for a, b in zip(self._starts, ends, strict=True)])

    def compute(self, x_AD: Tensor, rows: ExpertRows, stacks: Sequence[Tensor], chunk: int = 0) -> Tensor:
        """See :meth:`RoutedExperts.compute`. Experts without rows compute none, so that all have a gradient."""
        counts = host_counts(rows)
        if not stacks[0].numel():  # not wrapped by FSDP2, and so not cast
            stacks = [stack.to(x_AD.dtype) for stack in stacks]
        first = self._starts[chunk]
        widths = self._local_widths[first : first + len(counts)]
        grouped = self._grouped(x_AD) and sum(counts) > 0 and sum(widths) > 0
        if grouped and torch.is_autocast_enabled(x_AD.device.type):  # autocast knows no custom function
            dtype = torch.get_autocast_dtype(x_AD.device.type)
            x_AD, *stacks = (t.to(dtype) for t in (x_AD, *stacks))
        x_MD = read_tokens(x_AD, rows)
        if grouped:
            buckets = _buckets(widths, x_AD.device)
            y_MD = in_buckets(x_MD, rows.weight_M, counts, rows.counts_L, stacks, buckets, self.activation)
        else:
            flat = (stack.split(widths) for stack in stacks)
            parts = zip(x_MD.split(counts), rows.weight_M.split(counts), *flat, strict=True)
            y_MD = torch.cat([self._one(*part) for part in parts])
        return sum_rows(y_MD, rows, x_AD.shape[0])

    def _grouped(self, x_AD: Tensor) -> bool:
        if self.kernel == "auto":
            return x_AD.is_cuda and grouped_never_waits(x_AD.dtype, x_AD.device)
        return self.kernel == "grouped_mm"  # of which float64 goes expert by expert, in the same buckets

    def _one(self, x_cD: Tensor, weight_c: Tensor, gate_FD: Tensor, up_FD: Tensor, down_FD: Tensor) -> Tensor:
        inner_cF = self.activation(x_cD @ gate_FD.t()) * (x_cD @ up_FD.t())
        return ((inner_cF @ down_FD) * weight_c.unsqueeze(1)).to(x_cD.dtype)


@functools.lru_cache(maxsize=4096)
def _buckets(widths: tuple[int, ...], device: torch.device) -> Buckets:
    return make_buckets(widths).to(device)
