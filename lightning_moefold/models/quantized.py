# SPDX-License-Identifier: Apache-2.0
"""The part of a language model that stores frozen weights in fewer bytes: makes, cuts and fills them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from lightning_moefold.errors import FoldError, InputError
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Box, ParameterLayout, ParameterPlan
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.blocks import check_blocks
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.weights import CheckpointWeights, WeightSource
from lightning_moefold.modules.base import Linear, ParallelRoot
from lightning_moefold.modules.experts.experts import WEIGHTS, Experts
from lightning_moefold.modules.quantization import Quantization
from lightning_moefold.modules.quantized import Codec, CodedModule, coded_weights


class QuantizedModel(ParallelRoot):
    """A model whose weights of attention, dense layers, shared experts and experts may be stored as bytes.

    Every rank keeps the bytes of its part over tp, or over ep and etp; data ranks share nothing. Embedding, head, norms,
    biases, routers and gates of shared experts stay numbers.

    Attributes:
        config: The model's configuration.
        source: Source of its weights; None for a model made by its constructor.
        weights_pending: Whether they are still to be filled in.
        quantized: How weights are stored; None for numbers.
        coded_layouts: Layout of each weight that is stored as bytes, as if it were numbers.
    """

    config: MoEConfig
    source: WeightSource | None = None
    weights_pending: bool = False
    quantized: Quantization | None = None

    def __init__(self) -> None:
        super().__init__()
        self.coded_layouts: dict[str, ParameterLayout] = {}

    @property
    def origin(self) -> Path | None:
        """Directory of the checkpoint that its weights come from; None if they come from a seed."""
        return self.source.checkpoint.path if isinstance(self.source, CheckpointWeights) else None

    def quantize(self, codec: Codec) -> None:
        """Makes room for bytes in place of weights that have no values yet.

        Raises:
            InputError: If rows are not whole blocks, or experts have uneven widths.
        """
        if self.config.is_packed:
            raise InputError("quantize needs experts of one width; leave it out for a packed model.")
        try:
            check_blocks(self.config, Fold(1))
        except FoldError as error:
            raise InputError(f"quantize={codec.kind!r} does not fit: {error}") from None
        self.quantized = codec.kind
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                module.quantize(codec, WEIGHTS)
                module.numbers_in_bytes = sum(map(prod, module.coded.values()))
            elif isinstance(module, Linear) and not name.endswith(".shared_expert_gate"):
                module.quantize(codec, ("weight",))
        for name, module, leaf in coded_weights(self):
            self.coded_layouts[name] = ParameterLayout(module.coded[leaf], ParameterPlan())
            del self.layouts[name]

    def cut_coded(self, plans: Mapping[str, ParameterPlan], mesh: FoldedMesh) -> None:
        """Makes room for this rank's parts only, as ``plans`` cut them, in place of whole weights."""
        shapes, self.coded_layouts = {name: old.shape for name, old in self.coded_layouts.items()}, {}
        for name, module, leaf in coded_weights(self):
            layer = ".".join(name.split(".")[:3])
            holders = self.layouts[f"{layer}.input_layernorm.weight"].pp_ranks
            layout = ParameterLayout(shapes[name], plans.get(name, ParameterPlan()), pp_ranks=holders)
            self.coded_layouts[name] = layout
            module.cut_coded(leaf, layout.tensor_box(mesh.place).sizes)

    @torch.no_grad()
    def fill_coded(self) -> None:
        """Reads, rounds and stores this rank's parts, one matrix at a time."""
        for name, module, leaf in coded_weights(self):
            assert self.source is not None
            if module.get_buffer(leaf).is_meta:
                continue
            [box] = self.coded_layouts[name].boxes(self.fold, self.rank)
            for part, bytes_X in _matrices(box, module, leaf):
                weight = torch.empty(part.sizes, dtype=torch.float32, device=bytes_X.device)
                self.source.fill(name, part, weight)
                assert module.codec is not None
                bytes_X.copy_(module.codec.encode(weight))
        if self.source is not None and not self.weights_pending:
            self.source.close()

    def check_trainable(self, adapted: bool) -> None:
        """Raises InputError for a step that would train weights which are bytes, unless it trains an adapter in their place."""
        if self.quantized is not None and not adapted:
            raise InputError(
                f"a model with quantize={self.quantized!r} cannot train its weights; add an adapter (add_adapter), or leave "
                "quantize out."
            )

    def check_writable(self, path: str | Path) -> None:
        """Raises InputError where the weights are not there to be written."""
        if self.quantized is not None:
            raise InputError(
                f"{path} would get weights rounded by quantize={self.quantized!r}; use save_adapter, and moefold merge with the "
                "checkpoint of the base."
            )


def _matrices(box: Box, module: CodedModule, leaf: str) -> Iterator[tuple[Box, torch.Tensor]]:
    """Yields the parts of a weight that are rounded by themselves, the whole or each expert's, and their bytes."""
    stored = module.get_buffer(leaf)
    if len(box.sizes) == 2:
        yield box, stored
        return
    for number, bytes_X in enumerate(stored):
        yield Box((box.offsets[0] + number, *box.offsets[1:]), (1, *box.sizes[1:])), bytes_X
