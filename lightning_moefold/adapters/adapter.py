# SPDX-License-Identifier: Apache-2.0
"""The adapter of a model. It is added once, before the strategy cuts the model, and is then a part of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moefold.adapters.attach import attach, is_adapter
from lightning_moefold.adapters.config import LoRA
from lightning_moefold.adapters.files import AdapterFiles, peft_config
from lightning_moefold.adapters.seeded import SeededAdapter
from lightning_moefold.checkpoint.hf_writer import Merge, OutputTensor
from lightning_moefold.errors import InputError

#: For each weight of experts, the A that belongs to it; in other modules, ``lora_A`` belongs to ``weight``.
_OF_EXPERTS = {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


class Adapter:
    """The adapter that :meth:`~lightning_moefold.MoECausalLM.add_adapter` has added to a model.

    Args:
        model: The model, before it is cut.
        given: Configuration of the adapter, or a directory in PEFT's format.

    Attributes:
        lora: Configuration of the adapter.
        shapes: Global shape of each A and B, by name.
        dtype: Their dtype, at least float32.
        source: Source of their values: a file or a seed.
        base: A hash of the model that it was added to; None where the model has no source of weights.
        trained: Names of parameters of the base that have been trainable in a step.

    Raises:
        InputError: If a target matches no module that can have an adapter.
        CheckpointError: If the directory does not hold an adapter of this model.
    """

    def __init__(self, model: nn.Module, given: LoRA | Path) -> None:
        files: AdapterFiles | None = None
        if isinstance(given, LoRA):
            self.lora = given
        else:
            files = AdapterFiles(given, model)
            self.lora = files.lora
        attach(model, self.lora)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
        self.dtype = model.get_parameter(next(iter(self.shapes))).dtype
        self.source = files or SeededAdapter(self.lora.seed, self.shapes)
        if files is not None:
            files.adopt(self.shapes)
        self.base: str | None = None
        self.trained: set[str] = set()
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.shapes)
        self._peft_config = peft_config(self.lora, owners, model)

    def peft_config(self, base: str | None) -> dict[str, Any]:
        """Returns the content of ``adapter_config.json`` for an adapter of the model in the directory ``base``."""
        return self._peft_config | {"base_model_name_or_path": base}

    def note_trained(self, model: nn.Module) -> None:
        """Remembers which parameters of the base train in the step that begins: checkpoints hold them from then on.

        Raises:
            InputError: If the adapter is one whose experts or routers train with dropout; see also :meth:`check_trained`.
        """
        if isinstance(self.source, AdapterFiles) and self.source.dropout:
            raise InputError(
                f"the adapter of {self.source.path} has experts or routers and lora_dropout={self.source.dropout}, which PEFT "
                "drops by masks of its own; set it to 0 in its adapter_config.json to go on without."
            )
        self.trained |= self.check_trained(model)

    def check_trained(self, model: nn.Module) -> set[str]:
        """Checks that trained parameters have one dtype, as FSDP2 requires of what it reduces together.

        Returns:
            Names of those of the base.

        Raises:
            InputError: Naming a parameter of the base that trains in another dtype than the adapter.
        """
        gathered = getattr(model, "compute_dtype", None)  # of weights that an earlier forward of the step has gathered
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in self.shapes}
        for name, parameter in trained.items():
            if parameter.dtype not in (self.dtype, gathered):
                ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, parameter.dtype))
                raise InputError(
                    f"{name!r} of the base trains in {theirs} beside an adapter in {ours}, and one dtype is reduced; freeze it, "
                    "or use a base in float32 with precision='bf16-mixed'."
                )
        return set(trained)

    def left_out(self, model: nn.Module) -> set[str]:
        """Returns the unchanged parameters of the base; checkpoints name the base instead of containing them."""
        never = {n for n, p in model.named_parameters() if not p.requires_grad}
        return never - self.trained - set(self.shapes)


def merges_of(
    lora: LoRA,
    tensors: Mapping[str, OutputTensor],
    parts: Mapping[str, OutputTensor],
    dtype_of: Callable[[str], torch.dtype],
) -> dict[str, Merge]:
    """Returns the merges that add an adapter to the weights ``tensors``, by weight.

    Args:
        lora: The adapter.
        tensors: The weights to write, by their names in the model.
        parts: All A and B, by their names in the model.
        dtype_of: Function that returns the dtype of a weight.
    """
    found = {}
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        of_experts = leaf in _OF_EXPERTS
        a = f"{owner}.{_OF_EXPERTS[leaf]}_lora_A" if of_experts else f"{owner}.lora_A"
        b = f"{owner}.{leaf.removesuffix('_proj')}_lora_B" if of_experts else f"{owner}.lora_B"
        if a in parts and (of_experts or leaf == "weight"):
            scale = lora.scale(lora.down_rank if of_experts else lora.rank)
            lengths = f"{owner}.lora_magnitude" if lora.use_dora else None
            add = partial(_merged, a=a, b=b, scale=scale, dtype=tensors[name].dtype, lengths=lengths)
            used = {part: parts[part] for part in (a, b, lengths) if part is not None}
            found[name] = Merge(used, add, dtype_of(name))
    return found


def _merged(
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    a: str,
    b: str,
    scale: float,
    dtype: torch.dtype,
    lengths: str | None,
) -> Tensor:
    """Computes ``W + s B A`` in float64, expert by expert, so that the only rounding is that to the final dtype.

    With DoRA, rows are scaled to their lengths.
    """
    total = torch.empty(weight.shape, dtype=dtype)
    tensors = (weight, parts[b], parts[a], total)
    for w, b_OR, a_RI, out in zip(*(t if weight.dim() == 3 else t.unsqueeze(0) for t in tensors), strict=True):
        merged = torch.addmm(w.double(), b_OR.double(), a_RI.double(), alpha=scale)
        if lengths is not None:
            merged *= (parts[lengths].double() / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        out.copy_(merged)
    return total
