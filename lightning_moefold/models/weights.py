# SPDX-License-Identifier: Apache-2.0
"""Sources of a model's weights: a checkpoint or a seed. A rank reads only the boxes that it stores.

Legend: V vocabulary, D hidden size, h half a head.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce

import torch
from torch import Tensor

from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.errors import CheckpointError
from lightning_moefold.kernels.noise import generator_of
from lightning_moefold.layout import Box
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.models.names import ParameterEntry, base_entries, bias_entries, disk_name, entries_on_disk

_ROWS_COMPARED = 8192  # at a time, of tensors that should be equal
_DEFERRED: ContextVar[bool] = ContextVar("moefold_deferred_weights", default=False)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Makes models in the context without storage; the code that opens the context loads their weights later."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def weights_are_deferred() -> bool:
    """Whether a :func:`deferred_weights` context is open, or tensors are being made on the meta device."""
    return _DEFERRED.get() or torch.get_default_device().type == "meta"


class WeightSource(ABC):
    """A source of pieces of parameters.

    Args:
        entries: The parameters by their names in the model, with the tensors that hold them.
    """

    def __init__(self, entries: dict[str, ParameterEntry]) -> None:
        self._entries = entries

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """Copies the part ``box`` of parameter ``name`` (its name in the model) into ``out``, whatever its dtype and device."""
        entry, slices = self._entries[name], box.slices()
        if box.numel == 0:
            return
        if not entry.stacked:
            out.copy_(self._read(entry.sources[0], entry, entry.source_slices(slices)))
            return
        for piece, source in zip(out, entry.sources[slices[0]], strict=True):
            piece.copy_(self._read(source, entry, slices[1:]))

    @abstractmethod
    def _read(self, source: str, entry: ParameterEntry, slices: tuple[slice, ...]) -> Tensor:
        """Returns a part of one of the tensors of ``entry``."""

    def holds(self, name: str) -> bool:
        """Whether the source has values for the buffer ``name``; otherwise the buffer starts at zero."""
        return False

    def dtype(self, name: str) -> torch.dtype | None:
        """Returns the dtype in which the parameter is stored; None if it is not stored."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies these weights."""

    def close(self) -> None:
        """Closes files."""


def read_whole(source: WeightSource, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A whole parameter of a source, on the CPU."""
    whole = torch.empty(shape, dtype=dtype)
    source.fill(name, Box.whole(shape), whole)
    return whole


class CheckpointWeights(WeightSource):
    """Weights of a Hugging Face checkpoint, checked against a configuration.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
    """

    def __init__(self, checkpoint: HFCheckpoint, config: MoEConfig) -> None:
        super().__init__(entries_on_disk(config, checkpoint.tensors))
        self.checkpoint = checkpoint
        expected = {source: entry.source_shape for entry in self._entries.values() for source in entry.sources}
        biases = bias_entries(config)
        if any(name in checkpoint.tensors for name in biases):  # the check reports layers without one
            self._entries |= biases
            expected |= {name: entry.shape for name, entry in biases.items()}
        lm_head = disk_name(config, "lm_head.weight")
        head: dict[str, tuple[int, ...]] = (
            {lm_head: (config.vocab_size, config.hidden_size)} if config.tie_word_embeddings else {}
        )
        rotary: dict[str, tuple[int, ...]] = {
            name: (config.head_dim // 2,) for name in checkpoint.tensors if name.endswith(".rotary_emb.inv_freq")
        }
        if lm_head in expected and lm_head not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor {lm_head!r}, which the configuration asks for; if the head is the "
                "embedding, set tie_word_embeddings=True."
            )
        checkpoint.check(expected, head | rotary)
        compare_redundant(checkpoint, config, rotary)

    def _read(self, source: str, entry: ParameterEntry, slices: tuple[slice, ...]) -> Tensor:
        return self.checkpoint.read(source, slices)  # a view of the mapped file, so each element is copied once

    def holds(self, name: str) -> bool:
        """See :class:`WeightSource`."""
        return name in self._entries

    def dtype(self, name: str) -> torch.dtype | None:
        """Returns the widest dtype of the parameter's tensors, since a stack consists of several."""
        return reduce(torch.promote_types, (self.checkpoint.tensors[s].dtype for s in self._entries[name].sources))

    def fingerprint(self) -> str:
        """See :class:`WeightSource`."""
        return self.checkpoint.fingerprint()

    def close(self) -> None:
        """See :class:`WeightSource`."""
        self.checkpoint.close()


def compare_redundant(checkpoint: HFCheckpoint, config: MoEConfig, rotary: Iterable[str]) -> None:
    """Compares a tied head with the embedding, and the stored frequencies ``rotary`` with the configuration's.

    Raises:
        CheckpointError: If they differ.
    """
    if (
        config.tie_word_embeddings
        and "lm_head.weight" in checkpoint.tensors
        and not _head_is_embedding(checkpoint, config)
    ):
        raise CheckpointError(
            f"{checkpoint.path} holds a head of its own ('lm_head.weight' is not the embedding), but its configuration says "
            "tie_word_embeddings=True; set tie_word_embeddings=False to train both, as transformers reads it, or delete the "
            "head from the file."
        )
    for name in rotary:
        stored_h = checkpoint.read(name, ())
        exponent_h = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        frequency_h = 1.0 / config.rope_theta**exponent_h
        close = any(
            torch.allclose(stored_h.double(), frequency_h / factor, rtol=4 * torch.finfo(stored_h.dtype).eps, atol=0.0)
            for factor in (1.0, config.rope_scaling_factor)
        )
        if not close:
            raise CheckpointError(
                f"{checkpoint.path} holds {name!r}, whose frequencies are not those of rope_theta={config.rope_theta} in its "
                "configuration; correct the field, or delete the tensor from the file."
            )


def _head_is_embedding(checkpoint: HFCheckpoint, config: MoEConfig) -> bool:
    for start in range(0, config.vocab_size, _ROWS_COMPARED):
        rows = (slice(start, min(start + _ROWS_COMPARED, config.vocab_size)), slice(0, config.hidden_size))
        head_VD, embedding_VD = (checkpoint.read(f"{n}.weight", rows) for n in ("lm_head", "model.embed_tokens"))
        if not bool((head_VD == embedding_VD).all()):
            return False
    return True


class SeededWeights(WeightSource):
    """Random initial weights: each tensor on disk is drawn whole from its name and the seed, and then cut.

    So the weights depend neither on the fold nor on which parameters a rank holds. Norms start at one and biases at
    zero. All other weights are normal with ``initializer_range``, and the padding token's embedding is zero.
    """

    def __init__(self, config: MoEConfig, seed: int) -> None:
        super().__init__(base_entries(config))
        self.config, self.seed = config, seed

    def _read(self, source: str, entry: ParameterEntry, slices: tuple[slice, ...]) -> Tensor:
        return self._draw(source, entry.source_shape)[slices]

    def _draw(self, source: str, shape: tuple[int, ...]) -> Tensor:
        if source.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.float32)
        if source.endswith(".bias"):
            return torch.zeros(shape, dtype=torch.float32)
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
        drawn.normal_(0.0, self.config.initializer_range, generator=generator_of(self.seed, source))
        if source == "model.embed_tokens.weight" and self.config.pad_token_id is not None:
            drawn[self.config.pad_token_id] = 0
        return drawn

    def fingerprint(self) -> str:
        """See :class:`WeightSource`."""
        written = json.dumps(written_config(self.config), sort_keys=True)
        return hashlib.blake2b(f"{self.seed} {written}".encode(), digest_size=16).hexdigest()
