# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer, stored as stacks with an expert axis.

Legend: A tokens that arrived, M rows in expert order (each reads one of the tokens), L local experts, D hidden size, F expert
width (cut over etp).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.dispatch import ExpertRows, Parcel, Return, TokenDispatcher
from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Cut, Family, ParameterPlan, TensorGradient, even_split
from lightning_moefold.mesh import SINGLE
from lightning_moefold.modules.base import ParallelModule, local, new_adapter, sparing_adapters
from lightning_moefold.modules.experts.copied import bytes_of_copy, lend
from lightning_moefold.modules.experts.dropout import Drop, dropping_experts, with_keys, without_keys
from lightning_moefold.modules.experts.float8_products import check_float8
from lightning_moefold.modules.experts.kernels import ExpertKernel, ExpertLoRA, gated_experts
from lightning_moefold.modules.experts.products import grouped_never_waits
from lightning_moefold.modules.experts.stack import split_stack
from lightning_moefold.modules.experts.transformer_engine import TransformerEngineExperts, check_recipe
from lightning_moefold.modules.mlp import ACTIVATIONS
from lightning_moefold.modules.quantized import CodedModule, CodedStack
from lightning_moefold.modules.recompute import recomputed
from lightning_moefold.modules.sequence import SequenceBatch

WEIGHTS = ("gate_proj", "up_proj", "down_proj")
_ADAPTER = ("gate_up_lora_A", "gate_lora_B", "up_lora_B", "down_lora_A", "down_lora_B")


class RoutedExperts(ParallelModule):
    """The experts of a layer: parameters of the EXPERT family with an expert axis first.

    Args:
        num_experts: E, spread evenly over ep.

    Attributes:
        copy_bytes: That a copy of one of them took in the latest pass that planned copies, its gradient included.
        plan: What the plans of all their parameters have in common.
        again: Whether backward computes again what the experts would keep of their activations.
        drops: Whether adapters drop inputs now.
        numbers_in_bytes: Numbers of all experts that are stored as bytes, and are no parameters.
    """

    copy_bytes: int = 0
    numbers_in_bytes: int = 0
    plan: ParameterPlan = ParameterPlan(Family.EXPERT)
    again: bool = False

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    @property
    def drops(self) -> bool:
        """See the class."""
        return False

    def check(self, fold: Fold) -> None:
        """Raises :class:`FoldError` if the experts do not spread evenly over ep."""
        fold.check_experts(self.num_experts)

    def check_copies(self) -> None:
        """Raises InputError where experts cannot compute on other ranks for a pass."""

    def bound_to_place(self, hidden_size: int) -> str | None:
        """What keeps experts from moving to other ranks; None where they can.

        Args:
            hidden_size: D.
        """
        buffer = next((name for name, _ in self.named_buffers()), None)
        return None if buffer is None else f"the buffer {buffer!r} belongs to no expert in particular"

    @abstractmethod
    def stacks(self) -> tuple[Tensor, ...]:
        """This rank's parts of the parameters, each with an axis of L local experts first."""

    @abstractmethod
    def compute(self, x_AD: Tensor, rows: ExpertRows, stacks: Sequence[Tensor], chunk: int = 0) -> Tensor:
        """Runs some experts on their rows and sums them per token, ``[A, D] -> [A, D]``; partial over etp.

        Args:
            x_AD: Tokens.
            rows: Which token each row reads, its weight, and the rows of each expert.
            stacks: Parameters of these experts.
            chunk: Which of the parcels this is; the same experts in every step.
        """

    def split(self, stack: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Cuts one of :meth:`stacks` into parts with these numbers of experts."""
        return split_stack(stack, sizes)

    @property
    def computes_again(self) -> bool:
        """Whether :meth:`compute` itself heeds :attr:`again`; what does not runs again as a whole."""
        return False

    def compiles(self, x_AD: Tensor) -> bool:
        """Whether :meth:`compute` is one graph for all counts of rows; if not, compiled layers leave it as it is."""
        return False

    def travelling(self, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
        """Returns the rows in which tokens travel to the experts: the tokens, perhaps with columns that :meth:`compute` takes off.

        Args:
            x_TD: Tokens of this rank.
            batch: Of which they are.
        """
        return x_TD

    def forward(self, parcels: list[Parcel], dispatcher: TokenDispatcher) -> list[Return]:
        """Waits for each parcel, computes it and sends the result home, while the next parcel is under way.

        One call for all parcels, because FSDP2 gathers weights and reduces gradients once a call. Weights of copies leave here
        too, gathered and not yet let go of.

        Args:
            parcels: The first one is under way already.
            dispatcher: Whose parcels they are.

        Returns:
            What :meth:`.TokenDispatcher.combine_postprocess` takes.
        """
        sizes, stacks, plan = dispatcher.experts_per_chunk, self.stacks(), dispatcher.copy_plan(parcels)
        if plan is not None and torch.is_grad_enabled():
            self.copy_bytes = bytes_of_copy(stacks)
        stacks, borrowed = lend(stacks, plan, dispatcher.ep)
        chunks = list(zip(*(self.split(stack, sizes) for stack in stacks), strict=True))
        returns, arriving = [], parcels[0]
        whole = self.again and not self.computes_again and torch.is_grad_enabled()
        compute = partial(recomputed, self.compute) if whole else self.compute
        for number in range(len(parcels)):
            parcel = arriving
            if number + 1 < len(parcels):
                arriving = dispatcher.token_dispatch(parcels[number + 1])
            x_AD, rows = dispatcher.dispatch_postprocess(parcel)
            chunk = chunks[number] if number < len(chunks) else borrowed.arrive()
            if self.compiles(x_AD):
                y_AD = compute(x_AD, rows, chunk, number)
            else:
                y_AD = comm.uncompiled(compute, x_AD, rows, chunk, number)
            y_AD = dispatcher.combine_preprocess(y_AD, parcel.plan)
            returns.append(dispatcher.token_combine(y_AD, parcel.plan))
        return returns


class Experts(RoutedExperts, CodedModule):
    """E gated feed-forward experts: ``down(act(gate(x)) * up(x))``, each on its own rows.

    Args:
        hidden_size: D.
        num_experts: E, spread evenly over ep.
        ffn_hidden_size: F.
        activation: A name in :data:`~.mlp.ACTIVATIONS`.

    Attributes:
        kernel: How the products are computed: ``"auto"``, ``"loop"``, ``"grouped_mm"``, ``"fp8"`` or ``"transformer_engine"``.
        lora_scale: s of an adapter for each expert; None without (:meth:`adapt`).
        lora_dropout: Probability with which an input of an adapter is dropped in training.
    """

    kernel: ExpertKernel = "auto"
    gate_up_lora_A: nn.Parameter
    gate_lora_B: nn.Parameter
    up_lora_B: nn.Parameter
    down_lora_A: nn.Parameter
    down_lora_B: nn.Parameter
    lora_scale: float | None = None
    lora_dropout: float = 0.0
    _lora_key: int = 0

    def __init__(self, hidden_size: int, num_experts: int, ffn_hidden_size: int, activation: str = "silu") -> None:
        super().__init__(num_experts)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))
        self._engines: dict[tuple[int, int, int, torch.dtype], TransformerEngineExperts] = {}
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=0.02)

    def adapt(self, gate_up_rank: int, down_rank: int, scale: float, dropout: float = 0.0, key: int = 0) -> None:
        """Adds an adapter without values for each expert: ``W + s B A``, where gate and up share A.

        Args:
            gate_up_rank: Of A ``[E, rank, D]``, and of B of gate and of up, ``[E, F, rank]`` each.
            down_rank: Of A ``[E, rank, F]`` and B ``[E, D, rank]``.
            scale: s.
            dropout: Probability with which an input of an A is dropped.
            key: By which dropout differs from that of other modules.
        """
        self.lora_dropout, self._lora_key = dropout, key
        self.lora_scale, e, f, d = scale, self.num_experts, self.ffn_hidden_size, self.hidden_size
        like = self.gate_proj if self.codec is None else self.gate_proj.new_empty(0, dtype=self.codec.dtype)
        shapes = (e, gate_up_rank, d), (e, f, gate_up_rank), (e, f, gate_up_rank), (e, down_rank, f), (e, d, down_rank)
        for name, shape in zip(_ADAPTER, shapes, strict=True):
            self.register_parameter(name, new_adapter(like, *shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        return super()._apply(sparing_adapters(self, fn), recurse)

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Experts over ep, their width over etp.

        Of an adapter, what has no width stays whole over etp, and its gradient is partial: A of gate and up, B of down.
        """
        self.check(fold)
        fold.check_width("etp", "ffn_hidden_size", self.ffn_hidden_size)
        experts = Cut("ep", 0, even_split(self.num_experts, fold.ep))
        widths = even_split(self.ffn_hidden_size, fold.etp)
        wide, narrow = (
            ParameterPlan(Family.EXPERT, (experts, Cut("etp", dim, widths)), TensorGradient.SHARDED) for dim in (1, 2)
        )
        plans = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        if self.lora_scale is None:
            return plans
        whole = ParameterPlan(Family.EXPERT, (experts,), TensorGradient.PARTIAL)
        return plans | dict(zip(_ADAPTER, (whole, wide, wide, narrow, whole), strict=True))

    def bound_to_place(self, hidden_size: int) -> str | None:
        """See :meth:`RoutedExperts.bound_to_place`."""
        if self.codec is not None:
            return f"quantize={self.codec.kind!r} keeps their weights as bytes"
        if self.kernel == "transformer_engine":
            return "expert_kernel='transformer_engine' keeps FP8 scales for each place and not for each expert"
        return super().bound_to_place(hidden_size)

    def check_kernel(self, kernel: ExpertKernel, fold: Fold, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError where shapes, dtype, device or an adapter do not allow ``kernel``."""
        if self.lora_scale is not None and kernel in ("fp8", "transformer_engine"):
            raise InputError(
                f"expert_kernel={kernel!r} computes no adapters of experts; use 'auto', or leave 'experts' out of the targets."
            )
        if self.lora_dropout and kernel == "grouped_mm":
            raise InputError(
                "expert_kernel='grouped_mm' drops no inputs of adapters; use 'auto', or dropout=0, or leave 'experts' out of the "
                "targets."
            )
        if self.codec is not None and kernel in ("fp8", "transformer_engine"):
            raise InputError(
                f"expert_kernel={kernel!r} does not compute with quantize={self.codec.kind!r}; use 'auto', or leave quantize out."
            )
        if kernel == "fp8":
            sizes = {"hidden_size": self.hidden_size, "ffn_hidden_size": self.ffn_hidden_size // fold.etp}
            check_float8(sizes, dtype, device)

    def check_copies(self) -> None:
        """See :meth:`RoutedExperts.check_copies`."""
        if self.kernel == "transformer_engine":
            raise InputError(
                "expert_copies do not go with expert_kernel='transformer_engine', which keeps FP8 scales for each place of an "
                "expert; use 'auto' or 'fp8'."
            )

    def stacks(self) -> tuple[Tensor, ...]:
        """Gate and up ``[L, F, D]``, down ``[L, D, F]``; with an adapter, its five stacks in the order of :meth:`adapt`.

        The adapter's are in the dtype of the others, in which they are multiplied. Weights of a quantised base are bytes
        ``[L, X]``.
        """
        stacks = [local(getattr(self, n)) for n in (*WEIGHTS, *(() if self.lora_scale is None else _ADAPTER))]
        return tuple(stacks) if self.codec is not None else tuple(stack.to(stacks[0].dtype) for stack in stacks)

    @property
    def computes_again(self) -> bool:
        """All kernels but Transformer Engine's, and without dropout."""
        return self.kernel != "transformer_engine" and not self.drops

    @property
    def drops(self) -> bool:
        """See :class:`RoutedExperts`."""
        return self.training and self.lora_scale is not None and self.lora_dropout > 0

    def travelling(self, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
        """See :meth:`RoutedExperts.travelling`."""
        return with_keys(x_TD, self._lora_key, batch.own_tokens(x_TD.device)) if self.drops else x_TD

    def compiles(self, x_AD: Tensor) -> bool:
        """Where experts go by ``grouped_mm``, of which torch can trace bfloat16 only; a loop asks for the counts of rows."""
        cast = torch.is_autocast_enabled(x_AD.device.type)
        dtype = torch.get_autocast_dtype(x_AD.device.type) if cast else x_AD.dtype
        by_itself = self.kernel == "auto" and x_AD.is_cuda and grouped_never_waits(dtype, x_AD.device)
        fits = dtype == torch.bfloat16 and all(n % 8 == 0 for n in self.gate_proj.shape[1:])
        fits = fits and self.lora_scale is None and self.codec is None
        return fits and (by_itself or self.kernel == "grouped_mm")

    def compute(self, x_AD: Tensor, rows: ExpertRows, stacks: Sequence[Tensor], chunk: int = 0) -> Tensor:
        """See :meth:`RoutedExperts.compute`."""
        drop = None
        if self.drops:
            x_AD, key_A = without_keys(x_AD, self.hidden_size)
            etp = SINGLE if self.mesh is None else self.mesh.axis("etp")
            drop = Drop(self.lora_dropout, key_A, etp.index * stacks[-2].shape[-1])
        if torch.is_autocast_enabled(x_AD.device.type):  # outside a language model; autocast knows no custom function
            dtype = torch.get_autocast_dtype(x_AD.device.type)
            x_AD, *stacks = (t.to(dtype) for t in (x_AD, *stacks))
        weights: list[Any] = list(stacks[:3])
        if self.kernel == "transformer_engine" and x_AD.dtype != torch.float64:
            check_recipe(self.mesh)
            experts, width, hidden = weights[0].shape
            key = chunk, experts, width, weights[0].dtype  # another when the layer is bound to another fold
            if key not in self._engines:
                self._engines[key] = TransformerEngineExperts(experts, hidden, width, weights[0].dtype)
            return self._engines[key](x_AD, rows, self.activation, *weights)
        lora = None
        if self.lora_scale is not None:
            lora = ExpertLoRA._make([*(stack.to(x_AD.dtype) for stack in stacks[3:]), self.lora_scale])
        if self.codec is not None:
            shapes = [self.coded[name][1:] for name in WEIGHTS]
            weights = [CodedStack(w, s, self.codec, x_AD.dtype) for w, s in zip(weights, shapes, strict=True)]
        gate, up, down = weights
        if lora is not None and drop is not None:
            return dropping_experts(x_AD, rows, self.activation, (gate, up, down), lora, drop)
        kernel = "loop" if self.kernel == "transformer_engine" else self.kernel  # float64, which that does not have
        again = self.again and self.computes_again
        return gated_experts(x_AD, rows, self.activation, gate, up, down, kernel, lora, again)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, makes engines of its own."""
        return self.__dict__ | {"_engines": {}}
