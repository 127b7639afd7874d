# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face configurations of the three families into :class:`MoEConfig`. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from lightning_moefold.errors import ConfigError
from lightning_moefold.models import rope
from lightning_moefold.models.config import KINDS, NEUTRAL, MoEConfig
from lightning_moefold.models.families import FAMILIES, known_families, registered_family
from lightning_moefold.models.fields import (
    BOOLEAN,
    COUNT,
    INTEGERS,
    NOT_NEGATIVE,
    NUMEROUS,
    POSITIVE,
    STRINGS,
    TOKENS,
    FieldReader,
    Kind,
    names_beside,
)
from lightning_moefold.modules.routers.options import RouterOptions
from lightning_moefold.modules.routers.registry import router_options

_KV_HEADS = {"mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_DTYPE = Kind("the name of a dtype", lambda value: isinstance(value, str) or str(value).startswith("torch."))
#: Fields of our configurations that Hugging Face's have under the same name and with the same default.
_SAME_DEFAULT = (
    "tie_word_embeddings", "pad_token_id", "hidden_act", "router_aux_loss_coef", "output_router_logits", "aux_loss",
    "router_z_loss_coef", "initializer_range",
)  # fmt: skip
#: The model type of a packed model, whose ``config.json`` is that of its family with the widths of all experts. ``transformers``
#: does not know it, so it refuses the directory instead of filling missing tensors with random numbers.
PACKED = "moefold_packed"
_OF_PACKED = ("packed_model_type", "expert_widths", "shared_expert_widths")
#: Fields that only change what a call returns. The source's value is written, whatever a run has set.
_OF_CALLS = ("output_router_logits",)


def read_hf_config(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[MoEConfig, set[str]]:
    """Builds a :class:`MoEConfig`; see :meth:`MoEConfig.from_hf`.

    Returns:
        The configuration, and the names of unknown fields.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a configuration is a mapping of fields to values, not {type(raw).__name__}.")
    if raw.get("model_type") == PACKED:
        plain, widths = _split_packed(raw)
        config, unknown = read_hf_config(plain, overrides)
        return replace(config, **widths), unknown
    family = overrides.get("model_type", raw.get("model_type"))
    if (registered := registered_family(family)) is not None:
        config, unknown = read_hf_config(registered.to_base(raw), registered.overrides_to_base(overrides))
        return replace(config, family=family, raw=dict(raw)), unknown
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type={family!r} is not supported; the supported architectures are {', '.join(known_families())}."
        )
    reader = FieldReader(_override(raw, overrides, family), family)
    reader.seen.add("model_type")
    _refuse(reader)
    _check_neutral(reader)
    layers = reader.get("num_hidden_layers", NUMEROUS, default=24 if family != "mixtral" else 32)
    heads = reader.get("num_attention_heads", POSITIVE)
    hidden = reader.get("hidden_size", POSITIVE)
    vocabulary = reader.get("vocab_size", POSITIVE)
    kv_heads = reader.get("num_key_value_heads", POSITIVE.or_null, default=_KV_HEADS[family])
    head_dim = reader.get("head_dim", POSITIVE.or_null, default=None)
    top_k = {"mixtral": 2, "qwen2_moe": 4}.get(family, 8)
    theta, factor = rope.read_rope(reader)
    common = {name: reader.get(name, KINDS[name], default=getattr(MoEConfig, name)) for name in _SAME_DEFAULT} | {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": hidden // heads if head_dim is None else head_dim,
        "num_experts_per_tok": reader.get("num_experts_per_tok", POSITIVE, default=top_k),
        "rms_norm_eps": reader.get("rms_norm_eps", NOT_NEGATIVE, default=1e-5 if family == "mixtral" else 1e-6),
        "rope_theta": theta,
        "rope_scaling_factor": factor,
        "router": _router(reader),
        "dtype": _dtype(reader),
        "raw": dict(raw),
    }
    specific = _mixtral(reader, layers) if family == "mixtral" else _qwen(reader, family, layers)
    unknown = set(overrides) - reader.seen
    if unknown:
        raise ConfigError(
            f"override {sorted(unknown)[0]!r} is not a field of a {family} configuration that changes the result."
        )
    return MoEConfig(**{**common, **specific}), (set(raw) - reader.seen - NEUTRAL) | rope.unknown_keys(reader.raw)


def _override(raw: Mapping[str, Any], overrides: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns the fields with overrides applied; an override replaces every other name of its field."""
    replaced = {name for field in overrides for name in names_beside(family, field)}
    kept = {name: value for name, value in rope.replace_rope(raw, overrides).items() if name not in replaced}
    return kept | dict(overrides)


def _refuse(reader: FieldReader) -> None:
    """Refuses fields that would change the result and are not supported."""
    reader.refuse_unless("attention_dropout", (0.0, None), "dropout would differ from rank to rank")
    reader.refuse_unless(
        "router_jitter_noise", (0.0, None), "it disturbs what experts compute, too; see input_jitter of RouterOptions"
    )
    reader.refuse_unless("quantization_config", (None, {}), "quantised weights cannot be trained")
    reader.refuse_unless("num_key_value_groups", (None,), "it is derived from the numbers of heads")
    reader.refuse_unless("per_layer_config", (None, {}), "all layers share their sizes")
    reader.refuse_unless("transformers_weights", (None,), "weights are read from model.safetensors or its index")


def _check_neutral(reader: FieldReader) -> None:
    """Checks fields that do not change training, but generation and warnings."""
    for field, kind in (
        ("max_position_embeddings", POSITIVE.or_null),
        ("eos_token_id", TOKENS.or_null),
        ("bos_token_id", TOKENS.or_null),
    ):
        if field in reader.raw:
            kind.check(field, reader.raw[field])


def _router(reader: FieldReader) -> RouterOptions:
    reader.seen.add("router")
    try:
        return router_options(reader.raw.get("router") or {})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"router: {error}") from None


def _dtype(reader: FieldReader) -> str | None:
    name = reader.get("dtype", _DTYPE.or_null, default=None)
    return None if name is None else str(name).removeprefix("torch.")


def _mixtral(reader: FieldReader, layers: int) -> dict[str, Any]:
    window = reader.get("sliding_window", POSITIVE.or_null, default=None)
    _check_layer_types(reader, layers, window)
    return {
        "intermediate_size": 0,
        "moe_intermediate_size": reader.get("intermediate_size", POSITIVE),
        "shared_expert_intermediate_size": 0,
        "num_experts": reader.get("num_local_experts", NUMEROUS, default=8),
        "norm_topk_prob": True,
        "sliding_windows": (window,) * layers,
    }


def _qwen(reader: FieldReader, family: str, layers: int) -> dict[str, Any]:
    qwen2 = family == "qwen2_moe"
    shared = reader.get("shared_expert_intermediate_size", COUNT, default=5632) if qwen2 else 0
    mlp_only = reader.get("mlp_only_layers", INTEGERS.or_null, default=None)
    found = {
        "intermediate_size": reader.get("intermediate_size", COUNT, default=5632 if qwen2 else 6144),
        "moe_intermediate_size": reader.get("moe_intermediate_size", POSITIVE),
        "shared_expert_intermediate_size": shared,
        "num_experts": reader.get("num_experts", NUMEROUS, default=60 if qwen2 else 128),
        "norm_topk_prob": reader.get("norm_topk_prob", BOOLEAN, default=False),
        "decoder_sparse_step": reader.get("decoder_sparse_step", POSITIVE, default=1),
        "mlp_only_layers": tuple(mlp_only or ()),
        "sliding_windows": _qwen_windows(reader, qwen2, layers),
    }
    if qwen2:
        return found | {"qkv_bias": reader.get("qkv_bias", BOOLEAN, default=True)}
    bias = reader.get("attention_bias", BOOLEAN, default=False)
    return found | {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _qwen_windows(reader: FieldReader, qwen2: bool, layers: int) -> tuple[int | None, ...]:
    used = reader.get("use_sliding_window", BOOLEAN, default=False)
    width = reader.get("sliding_window", (POSITIVE if used else COUNT).or_null, default=4096)
    window = width if used else None
    most = reader.get("max_window_layers", COUNT.or_null, default=28)
    if not qwen2:
        _check_layer_types(reader, layers, window)
        return (window,) * layers
    types = _layer_types(reader, layers)
    if types is None:
        if most is None and used:
            raise ConfigError("max_window_layers=None must be an integer, 0 or more, if use_sliding_window is on.")
        types = ["sliding_attention" if used and (i + 1) % 2 and i < most else "full_attention" for i in range(layers)]
    if window is None and "sliding_attention" in types:
        raise ConfigError(
            "layer_types holds 'sliding_attention', but no window is used; set use_sliding_window and sliding_window."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layer_types(reader: FieldReader, layers: int) -> list[str] | None:
    types = reader.get("layer_types", STRINGS.or_null, default=None)
    if types is None:
        return None
    if len(types) != layers:
        raise ConfigError(f"layer_types names {len(types)} layers, but num_hidden_layers={layers}.")
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise ConfigError(
                f"layer_types holds {kind!r}, which is not supported; use {' or '.join(map(repr, _LAYER_TYPES))}."
            )
    return list(types)


def _check_layer_types(reader: FieldReader, layers: int, window: int | None) -> None:
    """Refuses layer types that differ, in a family whose layers all have the same type."""
    kind = "full_attention" if window is None else "sliding_attention"
    for index, other in enumerate(_layer_types(reader, layers) or ()):
        if other != kind:
            raise ConfigError(
                f"layer_types makes layer {index} {other!r}, but every layer of this {reader.family} is {kind!r}; take "
                "layer_types out."
            )


def written_config(config: MoEConfig, dtype: str | None = None) -> dict[str, Any]:
    """Returns the ``config.json`` of a saved model: the source's fields, updated where they change what the model computes.

    Fields that only change what a call returns, such as ``output_router_logits``, keep the source's value, because they
    affect generation in ``transformers``.

    Args:
        config: The model's configuration.
        dtype: Data type on disk; by default that of the configuration.

    Raises:
        ConfigError: If a field of the configuration has no place in the family's ``config.json``.
    """
    if dtype is not None:
        return {k: v for k, v in written_config(config).items() if k != "torch_dtype"} | {"dtype": dtype}
    if config.is_packed:
        return _join_packed(config, written_config(replace(config, packed_widths=(), packed_shared_widths=())))
    if (registered := registered_family(config.family)) is not None:
        written = written_config(replace(config, family=None, raw=registered.to_base(config.raw)))
        return registered.from_base(written, config.raw)
    now = to_hf_config(config)
    kept = NEUTRAL.union(_OF_CALLS) - {"dtype", "torch_dtype"}
    neutral = {name: value for name, value in config.raw.items() if name in kept}
    lost: list[str] = []
    for make in (lambda: _replace_changed(config, now), lambda: neutral | now):
        try:
            written = make()
            read = read_hf_config(written, {})[0]
        except ConfigError:  # a source that can only be read with overrides
            continue
        unused = () if config.num_moe_layers < config.num_hidden_layers else ("intermediate_size",)
        same = replace(read, **{name: getattr(config, name) for name in (*_OF_CALLS, *unused)})
        lost = [f.name for f in fields(config) if f.compare and getattr(same, f.name) != getattr(config, f.name)]
        if not lost:
            return written
    raise ConfigError(
        f"{lost[0]}={getattr(config, lost[0])!r} cannot be written in a config.json of {config.model_type}."
    )


def _replace_changed(config: MoEConfig, now: dict[str, Any]) -> dict[str, Any]:
    """Returns the source's fields, with those replaced in which the configuration differs from the source."""
    source = to_hf_config(read_hf_config(config.raw, {})[0])
    changed = {name: value for name, value in now.items() if name not in source or source[name] != value}
    gone = set(source) - set(now) | {name for field in changed for name in names_beside(config.model_type, field)}
    gone |= set(rope.NAMES) if "rope_parameters" in changed else set()
    return {name: value for name, value in config.raw.items() if name not in gone} | changed


def to_hf_config(config: MoEConfig) -> dict[str, Any]:
    """Makes a Hugging Face configuration dictionary for a model that was not read from one."""
    architecture = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[config.model_type]
    same = (
        "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts_per_tok "
        "rms_norm_eps tie_word_embeddings pad_token_id hidden_act router_aux_loss_coef initializer_range"
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


def _split_packed(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configuration of a packed model's family, and the fields of :class:`MoEConfig` that hold the widths.

    Raises:
        ConfigError: If a field is missing or of another kind.
    """
    plain = {name: value for name, value in raw.items() if name not in _OF_PACKED} | {
        "model_type": raw.get(_OF_PACKED[0])
    }
    try:
        widths = tuple(tuple(of_layer) for of_layer in raw["expert_widths"])
        return plain, {"packed_widths": widths, "packed_shared_widths": tuple(raw["shared_expert_widths"])}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"config.json of a packed model lacks a list of widths ({error}).") from None


def _join_packed(config: MoEConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``config.json`` of a packed model; ``plain`` is that of its family."""
    kept = {name: value for name, value in plain.items() if name != "architectures"}
    return kept | {
        "model_type": PACKED,
        "packed_model_type": config.model_type,
        "expert_widths": [list(widths) for widths in config.packed_widths],
        "shared_expert_widths": list(config.packed_shared_widths),
    }
