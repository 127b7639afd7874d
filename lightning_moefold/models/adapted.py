# SPDX-License-Identifier: Apache-2.0
"""The part of a language model that handles adapters: adds, fills, writes and describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_moefold.adapters.adapter import Adapter
from lightning_moefold.adapters.config import LoRA
from lightning_moefold.adapters.files import separate_config
from lightning_moefold.adapters.layout import matrix_names
from lightning_moefold.adapters.saving import write_adapter
from lightning_moefold.adapters.seeded import SeededAdapter
from lightning_moefold.checkpoint import OutputTensor
from lightning_moefold.errors import InputError
from lightning_moefold.layout import Box, ParameterLayout, ParameterPlan, split_boxes
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models.quantized import QuantizedModel
from lightning_moefold.models.weights import SeededWeights
from lightning_moefold.modules.base import Linear, wide


class AdaptedModel(QuantizedModel):
    """A model that can have an adapter.

    Attributes:
        adapter: The adapter added by :meth:`add_adapter`; None without one.
    """

    adapter: Adapter | None = None

    def add_adapter(self, adapter: LoRA | Mapping[str, Any]) -> None:
        """Freezes the model and adds an adapter to it, which trains in its place; for ``configure_model``.

        Names of the model's own parameters stay. The bias of routers with ``bias_update_rate`` stays as it is from then on,
        unless the adapter has ``update_expert_bias``.

        Args:
            adapter: Configuration of the adapter (:class:`~lightning_moefold.LoRA`, or its fields as a mapping), whose A is
                drawn at random and whose B is zero.

        Raises:
            InputError: If a target names nothing that can have an adapter (the message lists what can), the model has one
                already, or the strategy has cut it.
        """
        self._add(LoRA.of(adapter))

    def load_adapter(self, path: str | Path) -> None:
        """Freezes the model and adds a stored adapter, which goes on training; in place of :meth:`add_adapter`.

        Args:
            path: Directory in PEFT's format.

        Raises:
            InputError: If the model has an adapter already, or the strategy has cut it.
            CheckpointError: If the directory is damaged, or its adapter is that of another model.
        """
        self._add(Path(path))

    def _add(self, given: LoRA | Path) -> None:
        if self.adapter is not None:
            raise InputError(
                "the model has an adapter already, and only one is supported; merge it first (moefold merge)."
            )
        if self.mesh is not None:
            raise InputError(
                "the strategy has cut the model already; call add_adapter in configure_model, where the model is made."
            )
        self.adapter = Adapter(self, given)
        self.adapter.base = None if self.source is None else self.source.fingerprint()
        self.layouts |= {name: ParameterLayout(shape, ParameterPlan()) for name, shape in self.adapter.shapes.items()}
        if self.weights_pending or next(self.parameters()).is_meta:
            return
        with torch.no_grad():
            for name in self.adapter.shapes:
                self.fill(name, self.get_parameter(name))
        self.adapter.source.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedModel:
        super()._apply(fn, recurse)
        if self.adapter is not None:  # a pipeline stage without adapters has been converted before it was cut
            own = (p.dtype for name, p in self.named_parameters() if name in self.adapter.shapes)
            self.adapter.dtype = next(own, self.adapter.dtype)
        return self

    def fill(self, name: str, parameter: Tensor) -> None:
        """Fills this rank's piece of a parameter from where its values come from."""
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        of_adapter = self.adapter is not None and name in self.adapter.shapes
        source = self.adapter.source if of_adapter and self.adapter is not None else self.source
        assert source is not None, "a model made by its constructor has no source of weights"
        boxes = self.layouts[name].boxes(self.fold, self.rank)
        of_base = of_adapter and name.endswith(".lora_magnitude") and isinstance(source, SeededAdapter)
        for box, part in zip(boxes, split_boxes(mine, boxes), strict=True):
            if of_base:
                part.copy_(self._lengths(name, box, part))
            else:
                source.fill(name, box, part)

    def _lengths(self, name: str, box: Box, like: Tensor) -> Tensor:
        """Returns the lengths of some rows of a weight of the base, with which DoRA starts."""
        weight_name = f"{name.rpartition('.')[0]}.weight"
        linear = self.get_submodule(name.rpartition(".")[0])
        assert isinstance(linear, Linear)
        (first,), (count,) = box.offsets, box.sizes
        if self.mesh is None and not self.weights_pending and linear.codec is None:
            weight = linear.weight.detach()[first : first + count]
        else:
            assert self.source is not None
            dtype = linear.weight.dtype if linear.codec is None else torch.float32
            weight = torch.empty(count, linear.in_features, dtype=dtype, device=like.device)
            self.source.fill(weight_name, Box((first, 0), (count, linear.in_features)), weight)
            if linear.codec is not None:
                weight = linear.codec.decode(linear.codec.encode(weight), tuple(weight.shape), linear.codec.dtype)
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide(weight.dtype))

    def save_adapter(self, path: str | Path, separate_experts: bool = False) -> None:
        """Writes the adapter alone, as PEFT loads it. Collective: every rank calls it.

        Args:
            path: The directory; one that holds an adapter is replaced, one with other files in it is refused.
            separate_experts: Write an adapter for each matrix of an expert, as older versions read them (PEFT and this model read
                them back at twice the rank for gate and up).

        Raises:
            InputError: If the model has no adapter.
            CheckpointError: If the directory cannot be written; PeerError on the other ranks. Nothing is left half-written.
        """
        if self.adapter is None:
            raise InputError("the model has no adapter; save_pretrained writes it as it is.")
        self.release_gathered_weights()
        world = SINGLE if self.mesh is None else self.mesh.world
        config, names = self.adapter.peft_config(None if self.origin is None else str(self.origin)), None
        if separate_experts:
            names = matrix_names(self.config.model_type == "mixtral")
            config = separate_config(config, self.adapter.lora, self.config.num_experts, names)
        write_adapter(path, config, self.adapter_tensors(), piece_of(dict(self.named_parameters())), world, names)

    def adapter_tensors(self) -> dict[str, OutputTensor]:
        """Returns the layouts of all A and B."""
        assert self.adapter is not None
        return {
            name: OutputTensor(shape, self.adapter.dtype, (name,), False, self.owners(name))
            for name, shape in self.adapter.shapes.items()
        }

    def owners(self, name: str) -> tuple[tuple[int, tuple[Box, ...]], ...]:
        """Returns which ranks write which parts of a parameter."""
        return tuple(self.layouts[name].owners(self.fold, list(range(self.fold.world_size))))

    def describe_adapter(self) -> dict[str, Any] | None:
        """What checkpoints say of the adapter, as plain data; None without one.

        Returns:
            ``lora``, its fields; ``base``, a hash of what it was added to (None for a model without source); ``seed`` of random
            weights, and ``path`` of a checkpoint, whichever the base has; ``quantize``, if it is stored as bytes.
        """
        if self.adapter is None:
            return None
        return {
            "lora": self.adapter.lora.as_dict(),
            "base": self.adapter.base,
            "seed": self.source.seed if isinstance(self.source, SeededWeights) else None,
            "path": None if self.origin is None else str(self.origin.resolve()),
            "quantize": self.quantized,
        }


def piece_of(held: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Gives this rank's pieces of tensors; nothing of what another pipeline stage holds."""

    def piece(name: str) -> Tensor:
        tensor = held[name].detach() if name in held else torch.empty(0)
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return piece
