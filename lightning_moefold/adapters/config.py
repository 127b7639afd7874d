# SPDX-License-Identifier: Apache-2.0
"""Configuration of adapters: LoRA (arXiv 2106.09685) replaces a frozen weight W by ``W + s B A``. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_moefold.errors import InputError, InputTypeError


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter: each targeted weight W becomes ``W + s B A``, where A and B are trained and W is frozen.

    A and B are stored in at least float32, also beside a W in 16 bits, and multiplied in the dtype of the model.

    Args:
        rank: Rank of A and B in attention, dense layers, shared experts and routers.
        alpha: Scale: s is ``alpha / rank``.
        targets: Names of modules, or ends of such names after a dot, as in PEFT: ``"q_proj"``, or
            ``"layers.3.self_attn.q_proj"``. ``gate_proj``, ``up_proj`` and ``down_proj`` are those of dense layers and
            shared experts. ``"experts"`` gives each routed expert its own adapter; ``"gate"`` is the router.
        expert_rank: Rank of the experts' A and B, with ``s = alpha / expert_rank``; by default ``rank``.
        dropout: Probability with which an input of A is dropped in training, by seed and place: the same under every fold.
            Routers have none. PEFT has none for experts, so that files of adapters with experts are written with 0.
        use_rslora: Whether s is ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        use_dora: Whether the rows of ``W + s B A`` are scaled to trained lengths (DoRA, arXiv 2402.09353). Only modules that
            PEFT takes as modules can have it: attention and the gate of a shared expert.
        seed: Seed from which A is drawn, together with its name; B starts with zeros.
        update_expert_bias: Whether to keep updating the bias of routers with ``bias_update_rate``, which belongs to the
            base.
        separate_gate_up: Whether the shared A of gate and up has twice ``expert_rank``, half of it for each. Files with
            a separate adapter for each matrix of an expert are read in this form.

    Raises:
        InputError: If a size is not positive, dropout is not a probability below 1, or there are no targets.
    """

    rank: int = 16
    alpha: float = 32
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    expert_rank: int | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    seed: int = 0
    update_expert_bias: bool = False
    separate_gate_up: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not self.targets:
            raise InputError(
                f"targets={self.targets!r} of LoRA must be a list of module names, such as ['q_proj', 'experts']."
            )
        object.__setattr__(self, "targets", tuple(self.targets))
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} of LoRA must be at least 0 and less than 1.")
        for name in ("rank", "expert_rank", "alpha"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or (name != "alpha" and value != int(value))):
                raise InputError(f"{name}={value} of LoRA must be positive, and a rank a whole number.")

    @property
    def down_rank(self) -> int:
        """Rank of the experts' product back to the hidden size."""
        return self.rank if self.expert_rank is None else self.expert_rank

    @property
    def gate_up_rank(self) -> int:
        """Rank of the A that gate and up of an expert share."""
        return self.down_rank * (2 if self.separate_gate_up else 1)

    def scale(self, rank: int) -> float:
        """Returns the factor s for a rank."""
        return self.alpha / (rank**0.5 if self.use_rslora else rank)

    def as_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain data, for checkpoints and configuration files."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def of(cls, given: LoRA | Mapping[str, Any]) -> LoRA:
        """Makes the configuration that a mapping describes.

        Raises:
            InputError: If a field is unknown, or it is no mapping.
        """
        if isinstance(given, LoRA):
            return given
        if not isinstance(given, Mapping):
            raise InputTypeError(
                f"an adapter of type {type(given).__name__} is neither LoRA nor a mapping; load_adapter takes a directory."
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(f"LoRA has no field {unknown[0]!r}; it has {', '.join(known)}.")
        return cls(**given)
