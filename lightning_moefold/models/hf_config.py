# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face configurations of the three families into :class:`MoEConfig`. Pure Python."""

from __future__ import annotations

from typing import Any

from lightning_moefold.models.config import FAMILIES, ConfigError, MoEConfig, warn_unknown
from lightning_moefold.modules.routers.options import RouterOptions
from lightning_moefold.modules.routers.registry import router_options

_MISSING = object()
_KV_HEADS = {"mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4}
_LAYER_TYPES = ("full_attention", "sliding_attention")


class _Reader:
    """Takes fields out of a configuration and remembers which were looked at."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.seen: set[str] = set()

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        """The first of ``names`` that is present (aliases), else the default."""
        self.seen.update(names)
        for name in names:
            if name in self.raw:
                return self.raw[name]
        if default is _MISSING:
            raise ConfigError(f"config.json has no field {names[0]!r}.")
        return default

    def refuse_unless(self, name: str, neutral: tuple[Any, ...], reason: str) -> None:
        """Refuses by name a field whose value would change the result."""
        value = self.get(name, default=neutral[0])
        if value not in neutral:
            raise ConfigError(f"{name}={value!r} is not supported ({reason}); set it to {neutral[0]!r}.")


def read_hf_config(raw: dict[str, Any], overrides: dict[str, Any]) -> MoEConfig:
    """Builds a :class:`MoEConfig`; see :meth:`MoEConfig.from_hf`."""
    reader = _Reader(raw)
    family = reader.get("model_type", default=None)
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type={family!r} is not supported; the supported architectures are {', '.join(FAMILIES)}."
        )
    reader.refuse_unless("attention_dropout", (0.0, 0, None), "dropout would differ from rank to rank")
    reader.refuse_unless(
        "router_jitter_noise",
        (0.0, 0, None),
        "it disturbs what experts compute, too; see input_jitter of RouterOptions",
    )
    options = _router(reader)
    reader.refuse_unless("quantization_config", (None,), "quantised weights cannot be trained")
    reader.refuse_unless("partial_rotary_factor", (1.0, None), "each head is turned as a whole")
    reader.refuse_unless("num_key_value_groups", (None,), "it is derived from the numbers of heads")
    layers = reader.get("num_hidden_layers", default=24 if family != "mixtral" else 32)
    heads = reader.get("num_attention_heads")
    hidden = reader.get("hidden_size")
    for name, size in (("num_attention_heads", heads), ("hidden_size", hidden)):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}={size!r} must be a positive integer.")
    theta, factor = _rope(reader, family)
    common = {
        "model_type": family,
        "vocab_size": reader.get("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": reader.get("num_key_value_heads", default=_KV_HEADS[family]) or heads,
        "head_dim": reader.get("head_dim", default=None) or hidden // heads,
        "num_experts_per_tok": reader.get("num_experts_per_tok", default={"mixtral": 2, "qwen2_moe": 4}.get(family, 8)),
        "rms_norm_eps": reader.get("rms_norm_eps", default=1e-5 if family == "mixtral" else 1e-6),
        "rope_theta": theta,
        "rope_scaling_factor": factor,
        "tie_word_embeddings": bool(reader.get("tie_word_embeddings", default=False)),
        "pad_token_id": _padding(reader),
        "hidden_act": reader.get("hidden_act", default="silu"),
        "router_aux_loss_coef": reader.get("router_aux_loss_coef", default=0.001),
        "output_router_logits": bool(reader.get("output_router_logits", default=False)),
        "aux_loss": reader.get("aux_loss", default="huggingface"),
        "router_z_loss_coef": reader.get("router_z_loss_coef", default=0.0),
        "router": options,
        "initializer_range": reader.get("initializer_range", default=0.02),
        "dtype": _dtype(reader),
        "raw": {**raw, "router": options.as_dict()} if "router" in raw else dict(raw),
    }
    specific = _mixtral(reader, layers) if family == "mixtral" else _qwen(reader, family, layers)
    warn_unknown(set(raw) - reader.seen)
    unknown = set(overrides) - reader.seen
    if unknown:
        raise ConfigError(
            f"override {sorted(unknown)[0]!r} is not a field of a {family} configuration that changes the result."
        )
    return MoEConfig(**{**common, **specific})


def _router(reader: _Reader) -> RouterOptions:
    try:
        return router_options(reader.get("router", default=None) or {})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"router: {error}") from None


def _padding(reader: _Reader) -> int | None:
    """A negative index counts from the end of the vocabulary, as in torch.nn.Embedding."""
    index = reader.get("pad_token_id", default=None)
    return index + reader.get("vocab_size") if index is not None and index < 0 else index


def _dtype(reader: _Reader) -> str | None:
    name = reader.get("dtype", "torch_dtype", default=None)
    return None if name is None else str(name).removeprefix("torch.")


def _rope(reader: _Reader, family: str) -> tuple[float, float]:
    default = 1e6 if family == "mixtral" else 1e4
    theta = reader.get("rope_theta", default=None)
    parameters = reader.get("rope_parameters", default=None) or {}
    scaling = reader.get("rope_scaling", default=None) or {}
    merged = {**scaling, **parameters}
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConfigError(f"rope_type={kind!r} is not supported; use 'default' or 'linear'.")
    if merged.get("partial_rotary_factor", 1.0) not in (1.0, 1, None):
        raise ConfigError("partial_rotary_factor is not supported; set it to 1.0.")
    factor = float(merged.get("factor", 1.0)) if kind == "linear" else 1.0
    return float(parameters.get("rope_theta", theta if theta is not None else default)), factor


def _mixtral(reader: _Reader, layers: int) -> dict[str, Any]:
    window = reader.get("sliding_window", default=None)
    return {
        "intermediate_size": 0,
        "moe_intermediate_size": reader.get("intermediate_size"),
        "shared_expert_intermediate_size": 0,
        "num_experts": reader.get("num_local_experts", "num_experts", default=8),
        "norm_topk_prob": True,
        "sliding_windows": (window or None,) * layers,
    }


def _qwen(reader: _Reader, family: str, layers: int) -> dict[str, Any]:
    qwen2 = family == "qwen2_moe"
    fields = {
        "intermediate_size": reader.get("intermediate_size", default=5632 if qwen2 else 6144),
        "moe_intermediate_size": reader.get("moe_intermediate_size"),
        "shared_expert_intermediate_size": reader.get("shared_expert_intermediate_size", default=5632) if qwen2 else 0,
        "num_experts": reader.get("num_experts", "num_local_experts", default=60 if qwen2 else 128),
        "norm_topk_prob": bool(reader.get("norm_topk_prob", default=False)),
        "decoder_sparse_step": reader.get("decoder_sparse_step", default=1),
        "mlp_only_layers": tuple(reader.get("mlp_only_layers", default=None) or ()),
        "sliding_windows": _qwen_windows(reader, qwen2, layers),
    }
    if qwen2:
        return fields | {"qkv_bias": bool(reader.get("qkv_bias", default=True))}
    bias = bool(reader.get("attention_bias", default=False))
    return fields | {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _qwen_windows(reader: _Reader, qwen2: bool, layers: int) -> tuple[int | None, ...]:
    used = bool(reader.get("use_sliding_window", default=False))
    width = reader.get("sliding_window", default=4096)
    window = (width or None) if used else None
    reader.get("max_window_layers", default=None)
    types = reader.get("layer_types", default=None)
    if not qwen2:
        return (window,) * layers
    if types is None:
        most = reader.get("max_window_layers", default=28)
        types = ["sliding_attention" if (i + 1) % 2 and i < most and used else "full_attention" for i in range(layers)]
    if len(types) != layers:
        raise ConfigError(f"layer_types names {len(types)} layers, but num_hidden_layers={layers}.")
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise ConfigError(
                f"layer_types holds {kind!r}, which is not supported; use {' or '.join(map(repr, _LAYER_TYPES))}."
            )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def to_hf_config(config: MoEConfig) -> dict[str, Any]:
    """A Hugging Face configuration dictionary for a model that was not read from one."""
    architecture = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[config.model_type]
    same = (
        "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts_per_tok "
        "rms_norm_eps tie_word_embeddings pad_token_id hidden_act router_aux_loss_coef output_router_logits initializer_range"
    )
    out = {name: getattr(config, name) for name in same.split()} | {"architectures": [f"{architecture}ForCausalLM"]}
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling_factor}
    out |= {"rope_parameters": rope, "head_dim": config.head_dim}
    if config.dtype:
        out["dtype"] = config.dtype
    ours = {
        "aux_loss": config.aux_loss, "router_z_loss_coef": config.router_z_loss_coef, "router": config.router.as_dict()
    }  # fmt: skip
    out |= {name: value for name, value in ours.items() if value not in ("huggingface", 0, {})}
    windows = {w for w in config.sliding_windows if w}
    if config.model_type == "mixtral":
        return out | {
            "num_local_experts": config.num_experts,
            "intermediate_size": config.moe_intermediate_size,
            "sliding_window": next(iter(windows), None),
        }
    out |= {
        "num_experts": config.num_experts,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": config.decoder_sparse_step,
        "mlp_only_layers": list(config.mlp_only_layers),
        "use_sliding_window": bool(windows),
        "sliding_window": next(iter(windows), None),
    }
    if config.model_type == "qwen2_moe":
        kinds = ["sliding_attention" if w else "full_attention" for w in config.sliding_windows]
        return out | {
            "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "qkv_bias": config.qkv_bias,
            "layer_types": kinds,
        }
    return out | {"attention_bias": config.qkv_bias}
