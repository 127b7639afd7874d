# SPDX-License-Identifier: Apache-2.0
"""Where a model's weights come from: a checkpoint, or a seed. Either way a rank asks for boxes, never for whole models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.layout import Box
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.names import ParameterEntry, bias_entries, parameter_entries

_DEFERRED: ContextVar[bool] = ContextVar("moefold_deferred_weights", default=False)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Models made inside are left without storage; whoever opened the context gives them their weights later."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def weights_are_deferred() -> bool:
    """Whether a :func:`deferred_weights` context is open, or tensors are being made on the meta device."""
    return _DEFERRED.get() or torch.get_default_device().type == "meta"


class WeightSource(Protocol):
    """Gives pieces of parameters."""

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """Copies the part ``box`` of parameter ``name`` (our name) into ``out``, whatever its dtype and device."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is anything for the buffer ``name``; it starts at zero otherwise."""
        ...

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which the parameter is stored, if it is stored."""
        ...

    def close(self) -> None:
        """Lets go of files."""
        ...


class CheckpointWeights:
    """Weights of a Hugging Face checkpoint, checked against a configuration.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
    """

    def __init__(self, checkpoint: HFCheckpoint, config: MoEConfig) -> None:
        self.checkpoint = checkpoint
        self._entries = parameter_entries(config)
        expected = {source: entry.source_shape for entry in self._entries.values() for source in entry.sources}
        biases = bias_entries(config)
        optional = frozenset(biases) | ({"lm_head.weight"} if config.tie_word_embeddings else set())
        checkpoint.check(expected, optional)
        self._entries |= {name: entry for name, entry in biases.items() if name in checkpoint.tensors}

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """See :class:`WeightSource`."""
        entry, slices = self._entries[name], box.slices()
        if box.numel == 0:
            return
        # What the checkpoint gives are views of the mapped file, so each element is copied once.
        if not entry.stacked:
            out.copy_(self.checkpoint.read(entry.sources[0], slices))
            return
        for piece, source in zip(out, entry.sources[slices[0]], strict=True):
            piece.copy_(self.checkpoint.read(source, slices[1:]))

    def holds(self, name: str) -> bool:
        """See :class:`WeightSource`."""
        return name in self._entries

    def dtype(self, name: str) -> torch.dtype | None:
        """See :class:`WeightSource`."""
        return self.checkpoint.tensors[self._entries[name].sources[0]].dtype

    def close(self) -> None:
        """See :class:`WeightSource`."""
        self.checkpoint.close()


class SeededWeights:
    """Random initial weights: each tensor as on disk is drawn whole from its own name and the seed, then cut.

    So they do not depend on the fold, nor on which parameters a rank holds. Norms start at one, biases at zero, all
    else is normal with ``initializer_range``; the padding token's embedding is zero.
    """

    def __init__(self, config: MoEConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._entries = parameter_entries(config)

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """See :class:`WeightSource`."""
        entry, slices = self._entries[name], box.slices()
        if box.numel == 0:
            return
        if not entry.stacked:
            out.copy_(self._draw(entry.sources[0], entry)[slices])
            return
        for piece, source in zip(out, entry.sources[slices[0]], strict=True):
            piece.copy_(self._draw(source, entry)[slices[1:]])

    def _draw(self, source: str, entry: ParameterEntry) -> Tensor:
        shape = entry.source_shape
        if source.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.float32)
        if source.endswith(".bias"):
            return torch.zeros(shape, dtype=torch.float32)
        digest = hashlib.blake2b(f"{self.seed}:{source}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
        drawn.normal_(0.0, self.config.initializer_range, generator=generator)
        if source == "model.embed_tokens.weight" and self.config.pad_token_id is not None:
            drawn[self.config.pad_token_id] = 0
        return drawn

    def holds(self, name: str) -> bool:
        """Buffers start at zero."""
        return False

    def dtype(self, name: str) -> torch.dtype | None:
        """Nothing is stored."""
        return None

    def close(self) -> None:
        """Nothing is open."""
