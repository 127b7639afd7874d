# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a dense checkpoint becomes a mixture of experts that computes the same at first.

With granularity G, the dense layer's F channels are cut into G parts, and the E experts are E / G groups of these G parts. The
experts of a group have the same router row, so a token that chooses the best k experts chooses k / G whole groups, with the same
weight p for the G experts of a group. All its weights sum to 1, so G p summed over its groups is 1::

    sum over groups of p * (sum over parts of G * down_part(act(gate_part x) * up_part x))
        =  sum over groups of G p * dense(x)  =  dense(x)

Down projections are multiplied by G and by nothing else, which rounds them if G is no power of two. Qwen2-MoE always has a
shared expert; its down projection is zero at first.

Legend: E experts, G granularity, F dense width, D hidden size.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.checkpoint import HFCheckpoint, write_hf_checkpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.compression.rewrite import whole_tensor
from lightning_moefold.errors import ConfigError, InputError
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.fields import POSITIVE
from lightning_moefold.models.names import parameter_entries
from lightning_moefold.models.rope import with_base
from lightning_moefold.models.weights import compare_redundant

_FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe"}
#: What ``transformers`` assumes where a dense configuration leaves a field out, and what it has for the mixture is another value.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
}
_DEFAULT_LAYERS, _DEFAULT_THETA = 32, 1e4
_CLASSES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
#: Fields that a dense configuration has and a mixture has not, or writes in its own way.
_DROPPED = (
    "model_type", "architectures", "intermediate_size", "attention_bias", "mlp_bias", "pretraining_tp", "torch_dtype",
    "layer_types", "max_window_layers", "use_sliding_window", "transformers_version", "sliding_window",
)  # fmt: skip


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a mixture.

    Args:
        experts: E, of width ``F / granularity`` each; a multiple of the granularity.
        top_k: Experts per token; a multiple of the granularity.
        granularity: Number of parts into which the dense layer is cut.
        noise: Standard deviation of noise on experts, as a share of that of each matrix; 0 for exact copies.
        router_std: Standard deviation of router rows; None for the configuration's ``initializer_range``.
        seed: Of noise and router rows.

    Raises:
        InputError: If the numbers do not give the dense model's function.
    """

    experts: int = 8
    top_k: int = 2
    granularity: int = 1
    noise: float = 0.0
    router_std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "granularity"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1.")
        for name in ("experts", "top_k"):
            if (value := getattr(self, name)) % self.granularity:
                legal = -(-value // self.granularity) * self.granularity
                raise InputError(
                    f"--{name.replace('_', '-')} {value} is not a multiple of --granularity {self.granularity}, so the experts "
                    f"of a token would not make up the dense layer; use {legal}."
                )
        if self.top_k > self.experts:
            raise InputError(f"--top-k {self.top_k} is more than --experts {self.experts}.")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise InputError(f"--noise {self.noise} must be 0 or more.")
        if self.router_std is not None and not (math.isfinite(self.router_std) and self.router_std > 0):
            raise InputError(f"--router-std {self.router_std} must be more than 0, so that groups of experts differ.")


def upcycle(dense: str | Path, output: str | Path, how: Upcycling = Upcycling()) -> MoEConfig:
    """Writes the mixture that computes what a dense checkpoint computes, in one process, layer by layer.

    Args:
        dense: Directory of a Llama, Mistral or Qwen2 model, or its name on the hub.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        how: Number and size of experts.

    Returns:
        The configuration that was written.

    Raises:
        ConfigError: If the dense model has something that the mixture's family has not.
        CheckpointError: If the checkpoint is damaged.
        OSError: If ``output`` cannot be written.
    """
    path = local_directory(dense)
    written = mixture_config(_read_config(path), how)
    config, checkpoint = MoEConfig.from_hf(written), HFCheckpoint(path)
    layout = _Source(checkpoint, config, how)
    optional = layout.optional()
    checkpoint.check(layout.expected(), optional)
    compare_redundant(checkpoint, config, [name for name in optional if name.endswith(".inv_freq")])
    tensors = {name: whole_tensor(entry, layout.dtype(name)) for name, entry in parameter_entries(config).items()}
    write_hf_checkpoint(local_path(output, "output"), written, tensors, layout.make, SINGLE, side_files_from=path)
    checkpoint.close()
    return config


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give a directory in Hugging Face format.") from None
    return dict(raw)


def mixture_config(dense: Mapping[str, Any], how: Upcycling) -> dict[str, Any]:
    """Returns the ``config.json`` of the mixture.

    Args:
        dense: That of the dense model.
        how: Number and size of experts.

    Raises:
        ConfigError: If a field of the dense model has no counterpart, or its width cannot be cut.
    """
    kind = dense.get("model_type")
    if kind not in _FAMILIES:
        raise ConfigError(
            f"model_type={kind!r} cannot be upcycled; {', '.join(_FAMILIES)} become {', '.join(sorted(set(_FAMILIES.values())))}."
        )
    dense = with_base({"num_hidden_layers": _DEFAULT_LAYERS, **_DEFAULTS[kind], **dense}, _DEFAULT_THETA)
    family = _FAMILIES[kind]
    width: Any = dense.get("intermediate_size")
    POSITIVE.check("intermediate_size", width)
    for field in ("mlp_bias", "attention_bias"):
        if dense.get(field) and kind != "qwen2":
            raise ConfigError(f"{field}=true has no counterpart in {family}; such a model cannot be upcycled.")
    if kind == "qwen2" and dense.get("use_sliding_window"):
        raise ConfigError(
            "use_sliding_window=true names other layers in qwen2 than in qwen2_moe, so the function would change; set it to false."
        )
    window = dense.get("sliding_window") if kind == "mistral" else None
    types = set(dense.get("layer_types") or ()) if kind == "mistral" else set()
    if types - {"full_attention", "sliding_attention"} or len(types) > 1:
        raise ConfigError(
            "layer_types gives layers different attention, which Mixtral's share; such a model cannot be upcycled."
        )
    window = None if types == {"full_attention"} else window
    if width % how.granularity:
        raise ConfigError(f"intermediate_size={width} does not divide by --granularity {how.granularity}.")
    part = width // how.granularity
    written = {name: value for name, value in dense.items() if name not in _DROPPED}
    written |= {
        "model_type": family, "architectures": [_CLASSES[family]], "num_experts_per_tok": how.top_k,
        "num_key_value_heads": dense.get("num_key_value_heads") or dense.get("num_attention_heads"),
        "rms_norm_eps": dense.get("rms_norm_eps", 1e-6), "tie_word_embeddings": dense.get("tie_word_embeddings", False),
        "hidden_act": dense.get("hidden_act", "silu"),
    }  # fmt: skip
    if "dtype" not in written and dense.get("torch_dtype"):
        written["dtype"] = dense["torch_dtype"]
    if family == "mixtral":
        return written | {"num_local_experts": how.experts, "intermediate_size": part, "sliding_window": window}
    return written | {
        "num_experts": how.experts, "moe_intermediate_size": part, "shared_expert_intermediate_size": part,
        "intermediate_size": width, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "use_sliding_window": False, "qkv_bias": True,
    }  # fmt: skip


class _Source:
    """Makes the parameters of a mixture from those of a dense checkpoint.

    Args:
        checkpoint: The dense one.
        config: Of the mixture.
        how: Number and size of experts.
    """

    def __init__(self, checkpoint: HFCheckpoint, config: MoEConfig, how: Upcycling) -> None:
        self.checkpoint, self.config, self.how = checkpoint, config, how

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of the dense checkpoint's tensors."""
        width, d = self.config.moe_intermediate_size * self.how.granularity, self.config.hidden_size
        shapes = {n: entry.shape for n, entry in parameter_entries(self.config).items() if ".mlp." not in n}
        for i in range(self.config.num_hidden_layers):
            mlp = f"model.layers.{i}.mlp"
            shapes |= {f"{mlp}.gate_proj.weight": (width, d), f"{mlp}.up_proj.weight": (width, d)}
            shapes[f"{mlp}.down_proj.weight"] = (d, width)
        return shapes

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of tensors that say nothing more: a tied head, and frequencies that are computed."""
        found = {name: (self.config.head_dim // 2,) for name in self.checkpoint.tensors if name.endswith(".inv_freq")}
        tied = self.config.tie_word_embeddings
        return found | ({"lm_head.weight": (self.config.vocab_size, self.config.hidden_size)} if tied else {})

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a parameter on disk: that of the dense layer that it comes from."""
        source = name if ".mlp." not in name else f"{name.partition('.mlp.')[0]}.mlp.gate_proj.weight"
        return self.checkpoint.tensors[source].dtype

    def make(self, name: str) -> Tensor:
        """Returns a parameter of the mixture."""
        layer, mlp, part = name.partition(".mlp.")
        if not mlp:
            return self.checkpoint.read(name, ())
        if part == "gate.weight":
            return self._router(name)
        if part == "shared_expert_gate.weight":
            return torch.zeros(1, self.config.hidden_size, dtype=self.dtype(name))
        which = part.removeprefix("experts.").removeprefix("shared_expert.").removesuffix(".weight")
        dense = self.checkpoint.read(f"{layer}.mlp.{which}.weight", ())
        parts = list(dense.chunk(self.how.granularity, dim=1 if which == "down_proj" else 0))
        if part.startswith("shared_expert."):
            return torch.zeros_like(parts[0]) if which == "down_proj" else parts[0].clone()
        if which == "down_proj":
            parts = [piece * self.how.granularity for piece in parts]
        return self._noisy(name, torch.stack(parts * (self.how.experts // self.how.granularity)))

    def _router(self, name: str) -> Tensor:
        """The experts of a group have the same row."""
        std = self.config.initializer_range if self.how.router_std is None else self.how.router_std
        groups = self.how.experts // self.how.granularity
        row_GD = std * torch.randn(groups, self.config.hidden_size, generator=self._generator(name))
        return row_GD.repeat_interleave(self.how.granularity, 0).to(self.dtype(name))

    def _noisy(self, name: str, stack_EOI: Tensor) -> Tensor:
        if self.how.noise == 0:
            return stack_EOI
        std = self.how.noise * float(stack_EOI[0].double().std())
        noise = torch.randn(stack_EOI.shape, generator=self._generator(name))
        return (stack_EOI.double() + std * noise).to(stack_EOI.dtype)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.how.seed}/{name}".encode()))
