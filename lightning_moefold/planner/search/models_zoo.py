# SPDX-License-Identifier: Apache-2.0
"""Known models, from their published ``config.json``. Pure Python."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path

from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.errors import ConfigError
from lightning_moefold.models.config import MoEConfig

_mixtral = partial(
    MoEConfig,
    model_type="mixtral",
    vocab_size=32000,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=0,
    shared_expert_intermediate_size=0,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    dtype="bfloat16",
)
_qwen2 = partial(
    MoEConfig,
    model_type="qwen2_moe",
    vocab_size=151936,
    head_dim=128,
    norm_topk_prob=False,
    qkv_bias=True,
    rope_theta=1e6,
    dtype="bfloat16",
)
_qwen3 = partial(
    MoEConfig,
    model_type="qwen3_moe",
    vocab_size=151936,
    num_key_value_heads=4,
    head_dim=128,
    shared_expert_intermediate_size=0,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    qk_norm=True,
    rope_theta=1e6,
    dtype="bfloat16",
)

MODELS: dict[str, MoEConfig] = {
    "mixtral-8x7b": _mixtral(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, moe_intermediate_size=14336
    ),
    "mixtral-8x22b": _mixtral(
        hidden_size=6144, num_hidden_layers=56, num_attention_heads=48, moe_intermediate_size=16384
    ),
    "qwen1.5-moe-a2.7b": _qwen2(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
    ),
    "qwen2-57b-a14b": _qwen2(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
        num_experts=64,
        num_experts_per_tok=8,
    ),
    "qwen3-30b-a3b": _qwen3(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        intermediate_size=6144,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _qwen3(
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        intermediate_size=12288,
        moe_intermediate_size=1536,
    ),
}


def find_model(name_or_directory: str) -> MoEConfig:
    """Returns a known model by name, or reads the ``config.json`` of a directory in Hugging Face format.

    Raises:
        ConfigError: If there is neither, or the configuration cannot be honoured.
    """
    key = name_or_directory.lower().rsplit("/", 1)[-1]
    if key in MODELS and not Path(name_or_directory).is_dir():
        return MODELS[key]
    path = local_directory(name_or_directory, "config")
    if path.name == "config.json":
        path = path.parent
    if not path.is_dir():
        close = difflib.get_close_matches(key, MODELS, 1) or [name for name in MODELS if name.startswith(key)][:1]
        raise ConfigError(
            f"model {name_or_directory!r} is neither a directory with a config.json nor a known name"
            + (f" (did you mean {close[0]}?)" if close else "")
            + f"; known are {', '.join(MODELS)}."
        )
    return MoEConfig.from_pretrained(path)
