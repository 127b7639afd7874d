# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum whose matrices are made orthogonal by Newton-Schulz iterations, the same under every fold.

The iteration needs whole matrices. So the ranks that hold pieces of the same matrices divide these among them, and the rank that
has made a matrix whole sends the pieces of the result back. All else (embedding, head, routers, norms, biases) goes by AdamW.

Legend: E experts, A rows, B columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from typing_extensions import override

from lightning_moefold.errors import InputError
from lightning_moefold.optim.matrices import Part, apply_to_whole, in_chunks
from lightning_moefold.parallel.gradients import local_part

#: Names of matrices that go by AdamW.
BY_ADAMW = ("*embed*", "*lm_head*", "*.gate.*")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of a model, AdamW for the rest.

    Weights with two dimensions and each matrix of each expert go by Newton-Schulz, with the learning rate times
    ``sqrt(max(1, rows / columns))``. They are told by their names: under :class:`~lightning_moefold.MoEFoldStrategy` plain
    ``module.parameters()`` will do, elsewhere give ``module.named_parameters()``. The update of a matrix that is cut is computed
    by one of the ranks that hold a piece of it.

    Args:
        params: Parameters, pairs of name and parameter, or groups of either.
        lr: Learning rate of the matrices.
        momentum: Of the matrices.
        nesterov: Whether the update looks one step of momentum ahead.
        weight_decay: Decoupled decay of all parameters.
        ns_steps: Newton-Schulz iterations; in bfloat16, in float64 for float64 parameters.
        adamw_lr: Learning rate of the rest; a schedule of ``lr`` scales it too.
        adamw_betas: Of AdamW.
        adamw_eps: Of AdamW.
        adamw_names: Patterns of names of matrices that go by AdamW.

    Raises:
        InputError: If a value is out of range; in a step, if a matrix has no name.

    Example::

        def configure_optimizers(self):
            return Muon(self.parameters(), lr=0.02, adamw_lr=3e-4)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_names: Sequence[str] = BY_ADAMW,
    ) -> None:
        least_zero = {"lr": lr, "weight_decay": weight_decay, "adamw_lr": adamw_lr, "adamw_eps": adamw_eps}
        for name, value in least_zero.items():
            if not value >= 0:
                raise InputError(f"{name}={value} of Muon must not be negative.")
        shares = {"momentum": momentum} | {f"adamw_betas[{i}]": beta for i, beta in enumerate(adamw_betas)}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise InputError(f"{name}={value} of Muon must be at least 0 and less than 1.")
        if ns_steps < 1:
            raise InputError(f"ns_steps={ns_steps} of Muon must be at least 1.")
        if lr == 0:
            raise InputError(
                "lr=0 of Muon leaves nothing by which a schedule could scale adamw_lr; use a positive one."
            )
        self._names: dict[int, str] = {}
        self._patterns = tuple(adamw_names)
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "ns_steps": ns_steps,
            "adamw_ratio": adamw_lr / lr, "adamw_betas": tuple(adamw_betas), "adamw_eps": adamw_eps,
        }  # fmt: skip
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Not in the group, which a checkpoint stores for all pipeline stages.
        self._names |= {id(p): n for p, n in zip(group["params"], group.pop("param_names", ()), strict=False)}

    def learn_names(self, names: Mapping[int, str]) -> None:
        """Receives the names of parameters, by ``id``; the strategy calls it."""
        self._names = {**self._names, **names}

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: list[tuple[nn.Parameter, bool]] = []
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                kind = self._kind(parameter)
                if kind is None:
                    self._by_adamw(group, parameter)
                else:
                    matrices.append((parameter, kind == "experts"))
            self._by_newton_schulz(group, matrices)
        return loss

    def _kind(self, parameter: nn.Parameter) -> str | None:
        """Returns ``"matrix"``, ``"experts"`` for a stack with a matrix of each expert, or None for AdamW."""
        if parameter.dim() < 2:
            return None
        name = self._names.get(id(parameter))
        if name is None:
            raise InputError(
                f"Muon does not know the name of a parameter of shape {list(parameter.shape)}, and so not whether it is an "
                "embedding, a head or a router; give it module.named_parameters()."
            )
        if any(fnmatchcase(f".{name}", pattern) for pattern in self._patterns):
            return None
        if ".experts." in f".{name}":
            return "experts" if parameter.dim() == 3 else None
        return "matrix" if parameter.dim() == 2 else None

    def _by_newton_schulz(self, group: dict[str, Any], matrices: list[tuple[nn.Parameter, bool]]) -> None:
        def direction(update: Tensor) -> Tensor:
            return orthogonal(update, group["ns_steps"]) if update.numel() else update

        for chunk in in_chunks(matrices):
            updates = [self._update(group, part) for part in chunk]
            apply_to_whole(updates, [part.cuts for part in chunk], [part.whole for part in chunk], direction)
            for part, update in zip(chunk, updates, strict=True):
                rows, columns = part.parameter.shape[-2:]
                piece = local_part(part.parameter)[part.place]
                piece.mul_(1 - group["lr"] * group["weight_decay"])
                piece.add_(update.to(piece.dtype), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _update(self, group: dict[str, Any], part: Part) -> Tensor:
        """Adds to the momentum; returns this rank's piece of what is to be made orthogonal, as the iterations take it."""
        state = self.state[part.parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(part.parameter)
        assert part.parameter.grad is not None
        grad, buffer = (local_part(tensor)[part.place] for tensor in (part.parameter.grad, state["momentum_buffer"]))
        buffer.lerp_(grad.to(buffer.dtype), 1 - group["momentum"])
        return _narrow(grad.lerp(buffer.to(grad.dtype), group["momentum"]) if group["nesterov"] else buffer)

    def _by_adamw(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        state, (beta1, beta2) = self.state[parameter], group["adamw_betas"]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        pieces = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        piece, grad, mean, square = ([local_part(tensor)] for tensor in pieces)
        grad[0] = grad[0].to(mean[0].dtype)  # which a checkpoint of another precision has kept
        adamw(
            piece, grad, mean, square, [], [state["step"]], foreach=False, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"] * group["adamw_ratio"], weight_decay=group["weight_decay"], eps=group["adamw_eps"],
            maximize=False,
        )  # fmt: skip


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Returns nearly the nearest orthogonal matrix, by quintic Newton-Schulz iterations: singular values between 0.5 and 1.5.

    Args:
        matrix: ``[A, B]``, or ``[E, A, B]`` for a matrix of each expert.
        steps: Number of iterations.
    """
    a, b, c = _COEFFICIENTS
    x = _narrow(matrix)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    product: Callable[..., Tensor] = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        square = x @ x.mT
        x = product(x, product(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _narrow(matrix: Tensor) -> Tensor:
    """In the dtype of the iterations."""
    return matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
