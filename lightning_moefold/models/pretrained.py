# SPDX-License-Identifier: Apache-2.0
"""The part of a language model that makes it from a checkpoint or a seed, and writes it as ``transformers`` loads it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import Self

from lightning_moefold.adapters.adapter import merges_of
from lightning_moefold.checkpoint import HFCheckpoint, OutputTensor, write_hf_checkpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.layout import Box, ParameterLayout, ParameterPlan
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models.adapted import AdaptedModel, piece_of
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.models.names import bias_entries, parameter_entries
from lightning_moefold.models.weights import CheckpointWeights, SeededWeights, WeightSource, weights_are_deferred
from lightning_moefold.modules.quantization import Quantization
from lightning_moefold.modules.quantized import Codec


class PretrainedModel(AdaptedModel):
    """A model that comes from a checkpoint or a seed, and can be written to a checkpoint.

    Attributes:
        tokenizer_path: Directory whose tokenizer exports carry instead of that of the model's checkpoint. TextData sets it.
    """

    tokenizer_path: Path | None = None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.layouts = {
            name: ParameterLayout(entry.shape, ParameterPlan())
            for name, entry in (parameter_entries(config) | bias_entries(config)).items()
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        quantize: Quantization | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Reads a directory in Hugging Face format: config.json and safetensors.

        Args:
            path: The directory, or the name of a model on the hub (``"organisation/name"``, ``"organisation/name@revision"``).
            dtype: Data type of the parameters in memory; by default torch's default dtype, which inside a Trainer
                follows the precision (float32 for ``32-true`` and ``bf16-mixed``, bfloat16 for ``bf16-true``).
            revision: Branch, tag or commit of a model on the hub; the same as ``@revision`` behind its name.
            quantize: Store the weights of attention, dense layers and experts, which then cannot train, in fewer bytes:
                ``"nf4"`` (4 bits, by bitsandbytes) or ``"int8"``. An adapter trains on them (:meth:`add_adapter`).
            **config_overrides: Replace fields of config.json, such as ``output_router_logits=True``.

        Raises:
            ConfigError: If the architecture or a field is not supported.
            CheckpointError: If a tensor is missing, unexpected or of the wrong shape, or a file is damaged.
            InputError: If ``quantize`` is unknown, or its library is not installed.
        """
        path = local_directory(path, revision=revision)
        config = MoEConfig.from_pretrained(path, **config_overrides)
        return cls._make(config, CheckpointWeights(HFCheckpoint(path), config), dtype, quantize)

    @classmethod
    def from_config(
        cls,
        config: MoEConfig | Mapping[str, Any] | str | Path,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        quantize: Quantization | None = None,
    ) -> Self:
        """Makes a model with random weights, which depend only on the seed and the parameters' names, not on the fold.

        Args:
            config: A configuration, Hugging Face's dictionary, or a directory with config.json.
            seed: Seed of the random weights.
            dtype: Data type of the parameters in memory; by default torch's default dtype.
            quantize: As in :meth:`from_pretrained`.
        """
        if isinstance(config, (str, Path)):
            config = MoEConfig.from_pretrained(config)
        elif not isinstance(config, MoEConfig):
            config = MoEConfig.from_hf(config)
        return cls._make(config, SeededWeights(config, seed), dtype, quantize)

    @classmethod
    def _make(
        cls, config: MoEConfig, source: WeightSource, dtype: torch.dtype | None, quantize: Quantization | None
    ) -> Self:
        dtype = dtype or torch.get_default_dtype()
        with torch.device("meta"):
            model = cls(config).to(dtype)
        if quantize is not None:
            model.quantize(Codec(quantize, dtype))
        model.source, model.weights_pending = source, True
        if not weights_are_deferred():
            model.to_empty(device="cpu")
            model.load_weights()
        return model

    @torch.no_grad()
    def load_weights(self) -> None:
        """Fills this rank's pieces from the model's checkpoint or seed, without communication.

        Raises:
            CheckpointError: If a file cannot be read.
        """
        assert self.source is not None, "a model made by its constructor has no source of weights"
        for name, buffer in self.named_buffers():
            if name in self.coded_layouts:
                continue
            buffer.zero_()
            if self.source.holds(name):
                self.source.fill(name, Box.whole(buffer.shape), buffer)
        for name, parameter in self.named_parameters():
            self.fill(name, parameter)
        self.fill_coded()
        self.source.close()
        if self.adapter is not None:
            self.adapter.source.close()
        self.weights_pending = False

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype | None = None, max_shard_size: int = 5_000_000_000
    ) -> None:
        """Writes a directory that ``transformers`` loads. Collective: every rank calls it.

        An adapter is merged into the weights that are written, and stays apart in the model; :meth:`save_adapter` writes it
        alone.

        Args:
            path: The directory; one that holds a checkpoint is replaced, one with other files in it is refused.
            dtype: Data type on disk; by default that of the source, otherwise that of the configuration, otherwise that
                in memory.
            max_shard_size: Maximum size of a file in bytes.

        Raises:
            CheckpointError: If the directory cannot be written; PeerError on the other ranks. Nothing is left half-written.
            InputError: If the model was made with ``quantize``.
        """
        self.check_writable(path)
        self.release_gathered_weights()
        held: dict[str, Tensor] = dict(self.named_parameters()) | dict(self.stored_buffers())
        tensors = {}
        if self.config.router.changes_prediction:
            warnings.warn(
                f"{path} will route differently in transformers, whose {self.config.model_type} does not know the router options "
                f"{', '.join(sorted(self.config.router.as_dict()))}; from_pretrained of lightning_moefold honours them.",
                stacklevel=2,
            )
        for name, entry in (parameter_entries(self.config) | bias_entries(self.config)).items():
            kind = self._disk_dtype(name, dtype)
            tensors[name] = OutputTensor(entry.shape, kind, entry.sources, entry.stacked, self.owners(name))
        merges = None
        if self.adapter is not None:
            rank_zero_info(f"{path} has the adapter merged into its weights; save_adapter writes the adapter alone.")
            stored = next(self.parameters()).dtype
            merges = merges_of(self.adapter.lora, tensors, self.adapter_tensors(), lambda _: stored)
        config = written_config(self.config, None if dtype is None else str(dtype).removeprefix("torch."))
        world = SINGLE if self.mesh is None else self.mesh.world
        write_hf_checkpoint(
            path, config, tensors, piece_of(held), world, max_shard_size=max_shard_size, side_files_from=self.origin,
            tokenizer_from=self.tokenizer_path, merges=merges,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Describes what :meth:`save_pretrained` would write besides the weights, as plain data.

        Returns:
            ``config`` in Hugging Face's form, ``dtypes`` of the parameters on disk, by name, ``path`` of the
            checkpoint that the model was made from, or None, and ``tokenizer``, the path of :attr:`tokenizer_path`, or None;
            with an adapter, ``adapter`` describes it and its base.
        """
        return {
            "config": written_config(self.config),
            "dtypes": {
                name: str(self._disk_dtype(name, None)).removeprefix("torch.")
                for name in parameter_entries(self.config) | bias_entries(self.config)
            },
            "path": None if self.origin is None else str(self.origin.resolve()),
            "tokenizer": None if self.tokenizer_path is None else str(self.tokenizer_path.resolve()),
            "adapter": self.describe_adapter(),
        }

    def _disk_dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        if name in bias_entries(self.config):
            return torch.float32
        stored = self.source.dtype(name) if self.source is not None else None
        named = getattr(torch, self.config.dtype, None) if self.config.dtype else None
        return dtype or stored or named or next(self.parameters()).dtype
