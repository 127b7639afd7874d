# SPDX-License-Identifier: Apache-2.0
"""Streams calibration rows through a checkpoint, one layer in memory at a time, under any fold.

A rank reads its slices of one layer from safetensors, runs all its rows through it, and lets go of it. So a checkpoint may
be larger than the memory of all ranks together. Since no layer stays anywhere, the ranks of pp share the rows as those of
dp do.

Legend: N calibration rows, S positions of a row, B rows of a batch, T tokens of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.compression.rewrite import read_plain_config
from lightning_moefold.errors import InputError
from lightning_moefold.layout import Box, ParameterLayout, ParameterPlan
from lightning_moefold.mesh import SINGLE, Axis, FoldedMesh
from lightning_moefold.models.batch import IGNORED, BatchAxes, CausalLMBatch, empty_batch, read_batch
from lightning_moefold.models.causal_lm import make_layer
from lightning_moefold.models.weights import CheckpointWeights
from lightning_moefold.modules import DecoderLayer
from lightning_moefold.modules.base import ParallelModule
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.modules.vocabulary import VocabularyEmbedding
from lightning_moefold.parallel.roots import collect_plans, make_groups


@dataclass(frozen=True)
class CalibrationRows:
    """Tokens on which a model is analysed, the same on every rank.

    Args:
        token_NS: Token ids, int64.
        mask_NS: 0 at padding, int64; None where there is none.
        document_NS: Document of each token, int64; None where each row is one document.
    """

    token_NS: Tensor
    mask_NS: Tensor | None = None
    document_NS: Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_NS.dim() != 2 or self.token_NS.shape[0] == 0 or self.token_NS.shape[1] < 2:
            raise InputError(
                f"calibration rows of shape {list(self.token_NS.shape)} cannot be analysed; give at least one row of two tokens."
            )

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return self.token_NS.numel() if self.mask_NS is None else int(self.mask_NS.bool().sum())

    def take(self, rows: slice) -> CalibrationRows | None:
        """Returns some of the rows, or None if there are none."""
        if not len(self.token_NS[rows]):
            return None
        mask, documents = (None if part is None else part[rows] for part in (self.mask_NS, self.document_NS))
        return CalibrationRows(self.token_NS[rows], mask, documents)


@dataclass(frozen=True)
class Computing:
    """Where and in what precision a rank computes.

    Args:
        mesh: Groups of the fold; None for one process.
        dtype: Data type of weights and hidden states.
        device: Device of both.
        batch_size: Rows of a forward pass on each rank that has rows of its own.
    """

    mesh: FoldedMesh | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    batch_size: int = 1


class LayerStream:
    """A checkpoint whose layers are read one at a time.

    Args:
        path: Directory in Hugging Face format, or a name on the hub.
        computing: Where its layers run.

    Raises:
        ConfigError: If the architecture is not supported.
        CheckpointError: If the checkpoint is damaged.
        FoldError: If the fold does not suit the model.
    """

    def __init__(self, path: str | Path, computing: Computing = Computing()) -> None:
        self.path = local_directory(path)
        self.config = read_plain_config(self.path)
        if not self.config.num_moe_layers:
            raise InputError(f"{path} has dense layers only, so there are no experts to compress.")
        self.source = CheckpointWeights(HFCheckpoint(self.path), self.config)
        self.computing = computing
        if computing.mesh is not None:
            computing.mesh.fold.validate(self.config)

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts."""
        return [i for i in range(self.config.num_hidden_layers) if self.config.is_moe_layer(i)]

    def layer(self, index: int, change: Callable[[DecoderLayer], None] = lambda _: None) -> DecoderLayer:
        """Reads a layer.

        Args:
            index: Its number.
            change: Function that replaces parts of the layer by others with the same parameters, before it is cut and read.
        """
        with torch.device("meta"):
            layer = make_layer(self.config, index)
            change(layer)
        self._read(layer, f"model.layers.{index}")
        return layer.eval()

    def embed(self, rows: CalibrationRows) -> list[Tensor]:
        """Returns the hidden states of each batch of this rank before the first layer, ``[T, D]`` each."""
        with torch.device("meta"):
            embedding = VocabularyEmbedding(self.config.vocab_size, self.config.hidden_size)
        self._read(embedding, "model.embed_tokens")
        hidden = []
        for batch in self.batches(rows):
            if bool(batch.faults.any()):
                raise InputError(
                    f"the calibration rows hold tokens outside the vocabulary of {self.config.vocab_size}; tokenise them with the "
                    "model's own tokenizer."
                )
            hidden.append(embedding(batch.token_N, batch.sequence))
        return hidden

    def batches(self, rows: CalibrationRows) -> Iterator[CausalLMBatch]:
        """Describes the batches of this rank; every rank has the same number, of which some may be empty."""
        mesh, size, device = self.computing.mesh, self.computing.batch_size, self.computing.device
        number, ranks, axes = 0, 1, BatchAxes()
        if mesh is not None:  # ranks of dp and pp have rows of their own
            number, ranks = mesh.place["pp"] * mesh.fold.dp + mesh.place["dp"], mesh.fold.pp * mesh.fold.dp
            axes = BatchAxes(mesh.tp, mesh.axis("cp"), "auto", (number, ranks))
        most = -(-len(rows.token_NS) // ranks)
        mine = rows.take(slice(number, None, ranks))
        for first in range(0, most, size):
            part = None if mine is None else mine.take(slice(first, first + size))
            if part is None:
                batch = empty_batch(self.config, axes, rows.token_NS[:1].to(device))
            else:
                token_BS, others = part.token_NS.to(device), (part.mask_NS, part.document_NS)
                mask_BS, document_BS = (None if x is None else x.to(device) for x in others)
                # With labels, of which none counts, padding is left out of routing: nothing needs its output.
                labels_BS = torch.full_like(token_BS, IGNORED)
                batch = read_batch(
                    self.config, axes, 1, input_ids=token_BS, labels=labels_BS, attention_mask=mask_BS, position_ids=None,
                    document_ids=document_BS, loss_weights=None, keep_all=False,
                )  # fmt: skip
            batch.sequence.wants_routing = False
            batch.set_rotary_tables(self.computing.dtype)
            yield batch

    def run(self, layer: DecoderLayer, rows: CalibrationRows, hidden: list[Tensor]) -> None:
        """Replaces the hidden states of each batch by those after a layer."""
        for number, batch in enumerate(self.batches(rows)):
            hidden[number] = feed(layer, attend(layer, hidden[number], batch.sequence), batch.sequence)

    def close(self) -> None:
        """Closes the checkpoint's files."""
        self.source.close()

    def _read(self, module: nn.Module, prefix: str) -> None:
        """Gives a module without storage this rank's pieces of its parameters."""
        mesh, dtype, device = self.computing.mesh, self.computing.dtype, self.computing.device
        module.to(dtype)
        plans = {}
        if mesh is not None:
            make_groups(module, mesh)
            plans = collect_plans(module, mesh)
        for name, parameter in list(module.named_parameters()):
            layout = ParameterLayout(tuple(parameter.shape), plans.get(name, ParameterPlan()))
            box = Box.whole(layout.shape) if mesh is None else layout.tensor_box(mesh.place)
            piece = torch.empty(box.sizes, dtype=dtype, device=device)
            self.source.fill(f"{prefix}.{name}", box, piece)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, nn.Parameter(piece, requires_grad=False))
        for name, buffer in list(module.named_buffers()):
            value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            if self.source.holds(f"{prefix}.{name}"):
                self.source.fill(f"{prefix}.{name}", Box.whole(tuple(buffer.shape)), value)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, value)
        for part in module.modules():
            if isinstance(part, ParallelModule) and mesh is not None:
                part.bind(mesh)


@torch.no_grad()
def attend(layer: DecoderLayer, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
    """Runs the attention half of a layer."""
    return x_TD + layer.self_attn(layer.input_layernorm(x_TD), batch)


@torch.no_grad()
def feed(layer: DecoderLayer, x_TD: Tensor, batch: SequenceBatch) -> Tensor:
    """Runs the feed-forward half of a layer."""
    return x_TD + layer.mlp(layer.post_attention_layernorm(x_TD), batch)


def world_of(computing: Computing) -> Axis:
    """Returns the axis of all ranks."""
    return SINGLE if computing.mesh is None else computing.mesh.world


def check_finite(index: int, computing: Computing, *found: NDArray[np.float64]) -> None:
    """Refuses numbers of a layer by which nothing can be ranked.

    Args:
        index: Number of the layer.
        computing: In what precision it was computed.
        found: The numbers, the same on every rank.

    Raises:
        InputError: If one of them is NaN or infinite.
    """
    if not all(np.isfinite(numbers).all() for numbers in found):
        kind = str(computing.dtype).removeprefix("torch.")
        raise InputError(
            f"layer {index} computes NaN or infinite numbers in {kind}, by which nothing can be ranked; look for them in the "
            "checkpoint, or take a wider --dtype."
        )
