# SPDX-License-Identifier: Apache-2.0
"""Base classes of all blocks. A block declares how its parameters are cut, and receives the axes it computes over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from lightning_moefold.comm import linear
from lightning_moefold.fold import Fold
from lightning_moefold.layout import ParameterLayout, ParameterPlan
from lightning_moefold.mesh import SINGLE, Axis, FoldedMesh
from lightning_moefold.modules.lora import Places, drop, row_norms
from lightning_moefold.modules.quantized import CodedModule, product


class ParallelModule(nn.Module):
    """A block with parallel parameters. Outside a strategy it is a plain module on one rank.

    Attributes:
        mesh: The folded mesh once the strategy has parallelised the block; None before.
    """

    mesh: FoldedMesh | None = None

    @property
    def tp(self) -> Axis:
        """Tensor parallel axis."""
        return SINGLE if self.mesh is None else self.mesh.tp

    @property
    def fold(self) -> Fold:
        """The fold; one rank before the block is parallelised."""
        return Fold(1) if self.mesh is None else self.mesh.fold

    @property
    def rank(self) -> int:
        """This rank in the fold."""
        return 0 if self.mesh is None else self.mesh.rank

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Returns how ``fold`` cuts each parameter of this block, by name relative to it.

        A parameter that is not listed (here or in a nested block) is replicated, and its gradients are summed over tp.
        This is right for everything that acts on one token at a time under sequence parallelism.

        Raises:
            FoldError: If the fold cannot cut the block.
        """
        return {}

    def make_groups(self, mesh: FoldedMesh) -> None:
        """Creates the process groups that only this block needs. All ranks call it, including those of other pipeline stages."""

    def bind(self, mesh: FoldedMesh) -> None:
        """Gives the block its axes; called by the strategy, and again by one that changes the dispatch."""
        self.mesh = mesh


class ParallelRoot(ParallelModule):
    """A module that the strategy parallelises as one unit: a language model, or a block in a custom network.

    A root inside another root is a part of it.

    Attributes:
        settings: Settings with which the strategy has cut and runs it (:class:`~.parallel.settings.Settings`); None
            without a strategy.
        layouts: Layout of each parameter and stored buffer, by name relative to the root.
        compute_dtype: The dtype in which it computes, if it differs from the dtype of storage (``bf16-mixed``).
        rows: How the block's input rows are cut over cp (:class:`~.row_cut.RowCut`); None if they are whole.
        hidden_size: Size of its input and output per token, D.
        stages: Its pipeline stages, which share its modules and may be wrapped by FSDP2, but are not submodules of it.
        unequal: The open context of unequal calls, if any.
    """

    settings: Any = None
    compute_dtype: torch.dtype | None = None
    rows: Any = None
    hidden_size: int
    unequal: Any = None
    stages: Sequence[nn.Module] = ()

    def __init__(self) -> None:
        super().__init__()
        self.layouts: dict[str, ParameterLayout] = {}

    def units(self) -> list[nn.Module]:
        """Returns the modules whose dense weights are gathered together, inner modules first."""
        return [self]

    def stored_buffers(self) -> list[tuple[str, Tensor]]:
        """Returns the buffers that are saved in checkpoints, by name. They are whole on every rank that holds them."""
        return [
            (f"{prefix}.{name}".lstrip("."), buffer)
            for prefix, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]

    def use(self, settings: Any) -> None:
        """Changes to other settings that a root may have after it has been cut."""
        self.settings = settings

    def stand_in(self) -> None:
        """Takes part, without data, in a call of ranks that have data. Collective."""
        parameter = next(self.parameters())
        self(torch.empty(0, 1, self.hidden_size, dtype=parameter.dtype, device=parameter.device))

    def release_gathered_weights(self) -> None:
        """Frees weights that a forward pass gathered, so that ``named_parameters`` returns this rank's pieces."""
        for module in (*self.modules(), *self.stages):
            if isinstance(module, FSDPModule):
                module.reshard()


def parallel_roots(module: nn.Module) -> list[tuple[str, ParallelRoot]]:
    """Returns the outermost roots in a module, by name. A root with several names is listed once."""
    roots = [(name, m) for name, m in module.named_modules() if isinstance(m, ParallelRoot)]
    inner = {id(m) for _, root in roots for m in root.modules() if m is not root}
    return [(name, root) for name, root in roots if id(root) not in inner]


class Linear(CodedModule):
    """``y = x W^T + b`` on the local part of a weight ``[out, in]`` that may be stored as a DTensor.

    With an adapter, ``y = x W^T + b + s (d(x) A^T) B^T``, and ``x`` has two dimensions; d drops inputs in training. With DoRA
    (arXiv 2402.09353) each row of ``W + s B A`` is scaled to a trained length. A and B are multiplied in the dtype of ``x``.

    Attributes:
        lora_scale: s; None without an adapter (:meth:`adapt`).
        lora_dropout: Probability with which an input of the adapter is dropped in training.
        lora_lengths: Whether rows have trained lengths, ``lora_magnitude`` ``[out]``.
        lora_inputs: Axis over which the inputs are cut.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter
    lora_scale: float | None = None
    lora_lengths: bool = False
    lora_dropout: float = 0.0
    lora_inputs: Axis = SINGLE
    _lora_key: int = 0

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def adapt(self, rank: int, scale: float, dropout: float = 0.0, dora: bool = False, key: int = 0) -> None:
        """Adds an adapter without values, A ``[rank, in]`` and B ``[out, rank]``, where the weight is.

        Args:
            rank: Of A and B.
            scale: s.
            dropout: Probability with which an input of A is dropped.
            dora: Whether rows have trained lengths.
            key: By which dropout differs from that of other modules.
        """
        self.lora_scale = scale
        self.lora_dropout, self.lora_lengths, self._lora_key = dropout, dora, key
        like = self.weight if self.codec is None else self.weight.new_empty(0, dtype=self.codec.dtype)
        self.lora_A = new_adapter(like, rank, self.in_features)
        self.lora_B = new_adapter(like, self.out_features, rank)
        if dora:
            self.lora_magnitude = new_adapter(like, self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        return super()._apply(sparing_adapters(self, fn), recurse)

    def forward(
        self,
        x: Tensor,
        rows: slice | None = None,
        columns: slice | None = None,
        bias: bool = True,
        places: Places | None = None,
    ) -> Tensor:
        """Multiplies, ``[..., in] -> [..., out]`` (local sizes).

        Args:
            x: The input.
            rows: The outputs to make, of those whose weights are here; all by default.
            columns: The inputs that ``x`` has, of those whose weights are here; all by default.
            bias: Whether to add the bias.
            places: Of the tokens; dropout in training needs them (:func:`placed`).
        """
        b = None if self.bias is None or not bias else _part(local(self.bias), rows, None)
        if self.lora_scale is None:
            return self._base(x, rows, columns, b)
        dropped = x
        if self.lora_dropout and self.training and places is not None:
            first = self.lora_inputs.index * x.shape[-1] if columns is None else columns.start
            dropped = drop(x, self.lora_dropout, self._lora_key, places, first)
        a, lora_B = local(self.lora_A).to(x.dtype), _part(local(self.lora_B).to(x.dtype), rows, None)
        z = F.linear(dropped, _part(a, None, columns))
        if not self.lora_lengths:
            return self._base(x, rows, columns, b).addmm_(z, lora_B.t(), alpha=self.lora_scale)
        weight = local(self.weight) if self.codec is None else self.decode("weight", x.dtype)
        norm = row_norms(_part(weight, rows, None), a, lora_B, self.lora_scale, self.lora_inputs)
        factor = (_part(local(self.lora_magnitude), rows, None) / norm).to(x.dtype)
        base = self._base(dropped, rows, columns)
        y = torch.addmm(base, z, lora_B.t(), alpha=self.lora_scale) * factor
        if dropped is not x:
            y = y + self._base(x, rows, columns) - base
        return y if b is None else y + b

    def _base(self, x: Tensor, rows: slice | None, columns: slice | None, bias: Tensor | None = None) -> Tensor:
        if self.codec is None:
            return F.linear(x, _part(local(self.weight), rows, columns), bias)
        return product(x, lambda dtype: _part(self.decode("weight", dtype), rows, columns), bias)


def placed(part: nn.Module, places: Places) -> dict[str, Any]:
    """Returns the arguments that say to a :class:`Linear` where its tokens are, if it drops inputs now."""
    dropout: Any = getattr(part, "lora_dropout", None)
    return {"places": places} if part.training and dropout else {}


def row_plans(part: nn.Module, name: str, plan: ParameterPlan) -> dict[str, ParameterPlan]:
    """Plans the parameters of a :class:`Linear` whose outputs are cut: A stays whole, and its gradient is partial.

    Args:
        part: The layer. Something else in its place is planned as one without bias and adapter, whose weight the check of
            the module tree then misses.
        name: Its name in the module that plans.
        plan: The plan of the rows of its weight.
    """
    plans = {f"{name}.weight": plan}
    if getattr(part, "bias", None) is not None:
        plans[f"{name}.bias"] = plan
    if getattr(part, "lora_scale", None) is None:
        return plans
    if getattr(part, "lora_lengths", False):
        plans[f"{name}.lora_magnitude"] = plan
    return plans | {f"{name}.lora_B": plan}


def column_plans(part: nn.Module, name: str, plan: ParameterPlan) -> dict[str, ParameterPlan]:
    """Plans the parameters of a :class:`Linear` whose inputs are cut: B stays whole, and its gradient is partial.

    Arguments are those of :func:`row_plans`.
    """
    plans = {f"{name}.weight": plan}
    return plans if getattr(part, "lora_scale", None) is None else plans | {f"{name}.lora_A": plan}


def _part(tensor: Tensor, rows: slice | None, columns: slice | None) -> Tensor:
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]


def local(parameter: Tensor) -> Tensor:
    """Returns this rank's part of a parameter as a plain tensor.

    The gradient has the same placements as the parameter. For a replicated parameter with a *partial* gradient, the sum
    over tp is deliberately left out: all such gradients are summed in one collective after backward
    (:class:`~lightning_moefold.parallel.gradients.GradientSum`) instead of one small collective each.
    """
    if isinstance(parameter, DTensor):
        if _is_uneven(parameter):
            return _uneven_local(parameter)
        return parameter.to_local(grad_placements=parameter.placements)
    return parameter


def _is_uneven(parameter: DTensor) -> bool:
    """Whether a dimension behind the first is cut into unequal parts."""
    return any(
        isinstance(placement, Shard)
        and placement.dim > 0
        and parameter.shape[placement.dim] % parameter.device_mesh.size(i)
        for i, placement in enumerate(parameter.placements)
    )


def _uneven_local(parameter: DTensor) -> Tensor:
    """``to_local`` whose gradient has the strides of the parameter.

    DTensor multiplies the strides of a part by the number of ranks. Where the parts are unequal this gives strides that no
    parameter has, and autograd would copy the gradient into a new DTensor with equal parts.
    """
    mesh, placements, shape, stride = parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()

    def back(grad: Tensor) -> Tensor:
        return DTensor.from_local(grad.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)

    return linear(parameter, lambda whole: whole.to_local().detach(), back)  # type: ignore[attr-defined]


def new_adapter(weight: Tensor, *shape: int) -> nn.Parameter:
    """Makes a parameter of an adapter of ``weight``, without values.

    It is stored in at least float32, and in torch's default dtype if that is wider: small steps would be lost in 16 bits.
    """
    dtype = torch.promote_types(wide(weight.dtype), torch.get_default_dtype())
    return nn.Parameter(weight.new_empty(shape, dtype=dtype))


def sparing_adapters(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a conversion of a module's tensors that leaves its adapter's parameters in at least float32."""
    adapters = [p for name, p in module.named_parameters(recurse=False) if "lora_" in name]

    def converted(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        spared = result.dtype != wide(result.dtype) and any(tensor is p or tensor is p.grad for p in adapters)
        return tensor.to(result.device) if spared else result

    return converted if adapters else fn


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for numerically delicate steps: float32, or the input's dtype if that is wider."""
    return torch.promote_types(torch.float32, dtype)
