# SPDX-License-Identifier: Apache-2.0
"""Any module as an expert: slower than the built-in experts, for research on what an expert is.

Legend: A tokens, M rows in expert order, L local experts, D hidden size, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.errors import FoldError, InputError
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Cut, Family, ParameterPlan, TensorGradient, even_split
from lightning_moefold.modules.base import local
from lightning_moefold.modules.experts.experts import RoutedExperts
from lightning_moefold.modules.experts.kernels import read_tokens, sum_rows

#: Modules whose output depends on the rank's random numbers.
_RANDOM = (_DropoutNd, nn.RReLU)


class _RandomWatch(TorchDispatchMode):
    """Notes whether an operation draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class ModuleExperts(RoutedExperts):
    """E modules of one architecture, each on its own rows, one after the other.

    Their parameters are stacked along an expert axis (``stack.<name>``, ``[E, ...]``), so that everything else treats them
    like built-in experts: spread over ep, sharded over edp, stored under global names.

    Args:
        make_expert: Makes one expert, a module from ``[rows, D]`` to ``[rows, D]`` that acts on each row by itself and
            also takes zero rows. Called E times, so that every expert starts with its own weights.
        num_experts: E.

    Raises:
        ValueError: If an expert has buffers or a parameter with two names, or the experts have different parameters.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__(num_experts)
        experts = [make_expert() for _ in range(num_experts)]
        if next(experts[0].buffers(), None) is not None:
            raise InputError(
                f"{type(experts[0]).__name__} has buffers, which experts that share an architecture cannot; use an expert "
                "with parameters only."
            )
        if len(list(experts[0].named_parameters(remove_duplicate=False))) > len(list(experts[0].parameters())):
            raise InputError(
                f"{type(experts[0]).__name__} uses a parameter under two names, and each is stacked by itself; give the "
                "expert one name for it."
            )
        shapes = [{name: p.shape for name, p in expert.named_parameters()} for expert in experts]
        if any(shape != shapes[0] for shape in shapes):
            raise InputError("make_expert returns experts with different parameters; make all of one architecture.")
        self.stack = copy.deepcopy(experts[0])
        for name in shapes[0]:
            values = torch.stack([expert.get_parameter(name).detach() for expert in experts])
            owner, _, leaf = name.rpartition(".")
            trainable = experts[0].get_parameter(name).requires_grad
            self.stack.get_submodule(owner).register_parameter(leaf, nn.Parameter(values, trainable))
        # In a tuple, so that its own parameters, which are never used, are not those of this module.
        self._architecture = (experts[0].to("meta"),)

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Experts over ep; they cannot be cut over etp."""
        self.check(fold)
        if fold.etp > 1:
            raise FoldError(f"etp={fold.etp} would cut experts that are modules of your own; use etp=1.")
        plan = ParameterPlan(
            Family.EXPERT, (Cut("ep", 0, even_split(self.num_experts, fold.ep)),), TensorGradient.SHARDED
        )
        return {f"stack.{name}": plan for name, _ in self.stack.named_parameters()}

    def check_copies(self) -> None:
        """See :meth:`RoutedExperts.check_copies`."""
        for name, module in self.stack.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise InputError(
                    f"expert_copies do not go with experts that draw random numbers, and {name or type(module).__name__} drops "
                    f"with p={module.p}, on each rank others; use p=0, or no expert_copies."
                )

    def bound_to_place(self, hidden_size: int) -> str | None:
        """See :meth:`RoutedExperts.bound_to_place`. Random numbers come from the rank where an expert is."""
        if self._draws(hidden_size):
            return f"{type(self.stack).__name__} draws random numbers, of which each rank has its own"
        return super().bound_to_place(hidden_size)

    def _draws(self, hidden_size: int) -> bool:
        """Whether an expert draws random numbers in training; tried without storage."""
        expert = self._architecture[0].train()
        dtype = next((p.dtype for p in expert.parameters()), torch.get_default_dtype())
        watch = _RandomWatch()
        try:
            with torch.no_grad(), watch:
                expert(torch.empty(1, hidden_size, dtype=dtype, device="meta"))
        except Exception:  # the user's code, which may need values
            return any(isinstance(part, _RANDOM) and getattr(part, "p", 1) for part in self.stack.modules())
        return watch.drew

    def stacks(self) -> tuple[Tensor, ...]:
        """In the order of ``stack.named_parameters()``."""
        return tuple(local(p) for _, p in self.stack.named_parameters())

    def compute(self, x_AD: Tensor, rows: ExpertRows, stacks: Sequence[Tensor], chunk: int = 0) -> Tensor:
        """See :meth:`RoutedExperts.compute`. Experts without rows run on none, so that all have a gradient."""
        # Dropout follows the mode of the stack: Lightning puts modes back module by module, without train().
        for module, stacked in zip(self._architecture[0].modules(), self.stack.modules(), strict=True):
            module.training = stacked.training
        # A chunk of copies of which this rank has none is still part of the graph that other ranks wait for.
        if not len(rows.counts_L):
            return x_AD + sum(stack.sum().to(x_AD.dtype) for stack in stacks)
        names = [name for name, _ in self.stack.named_parameters()]
        experts = [dict(zip(names, values, strict=True)) for values in zip(*(s.unbind(0) for s in stacks), strict=True)]
        blocks = read_tokens(x_AD, rows).split(rows.counts_L.tolist())
        y_MD = torch.cat(
            [
                torch.func.functional_call(self._architecture[0], parameters, (block,))
                for parameters, block in zip(experts, blocks, strict=True)
            ]
        )
        return sum_rows((y_MD * rows.weight_M.unsqueeze(1)).to(y_MD.dtype), rows, x_AD.shape[0])
