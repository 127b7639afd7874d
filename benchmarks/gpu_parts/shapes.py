# SPDX-License-Identifier: Apache-2.0
"""Decoder layers of known models, made on the device with random weights: ours and Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.record import Context
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.hf_config import to_hf_config
from lightning_moefold.modules import Attention, DecoderLayer, Experts, GatedMLP, MoELayer, RouterOptions
from lightning_moefold.planner.search.models_zoo import find_model

MODELS = ("mixtral-8x22b", "qwen2-57b-a14b")


def layer_config(ctx: Context, name: str) -> MoEConfig:
    """One layer of a known model; in a rehearsal, a small one of its family."""
    config = replace(find_model(name), num_hidden_layers=1, sliding_windows=(None,))
    if not ctx.rehearse:
        return config
    shared = 64 if config.shared_expert_intermediate_size else 0
    return replace(
        config, vocab_size=96, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=shared,
        intermediate_size=64 if config.intermediate_size else 0,
    )  # fmt: skip


def tokens_of(ctx: Context) -> int:
    """T."""
    return int(ctx.pick(8192, 128))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of new floating-point tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def our_layer(
    ctx: Context, config: MoEConfig, *, dense: bool = False, dtype: torch.dtype = torch.bfloat16
) -> DecoderLayer:
    """Ours; with ``dense``, one gated feed-forward layer of equal FLOPs in the place of the experts."""
    with torch.device(ctx.device), default_dtype(dtype):
        attention = Attention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            qkv_bias=config.qkv_bias, rope_theta=config.rope_theta,
        )  # fmt: skip
        mlp: MoELayer | GatedMLP
        if dense:
            width = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
            mlp = GatedMLP(config.hidden_size, width)
        else:
            mlp = MoELayer(
                config.hidden_size, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size,
                router=RouterOptions(norm_topk_prob=config.norm_topk_prob),
                shared_ffn_hidden_size=config.shared_expert_intermediate_size,
            )  # fmt: skip
        layer = DecoderLayer(config.hidden_size, attention, mlp, config.rms_norm_eps)
    _randomize(layer)
    layer.to(ctx.device, dtype).train()
    if ctx.rehearse and isinstance(mlp, MoELayer):
        experts = mlp.experts
        assert isinstance(experts, Experts)
        experts.kernel = "grouped_mm"  # as on a GPU
    return layer


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1)


@dataclass
class HuggingFaceLayer:
    """Their layer, with what a model would hand it.

    Args:
        layer: The layer.
        tables: Rotary cosine and sine.
        config: Theirs.
        shares_weights: Whether all of its weights are copies of ours.
    """

    layer: nn.Module
    tables: tuple[Tensor, Tensor]
    config: Any
    shares_weights: bool

    def __call__(self, x: Tensor, experts: str) -> Tensor:
        """``[1, S, D] -> [1, S, D]`` with an implementation of the experts."""
        self.config._experts_implementation = experts
        found = self.layer(x, position_embeddings=self.tables, attention_mask=None)
        return found[0] if isinstance(found, tuple) else found


def hugging_face_layer(ctx: Context, config: MoEConfig, ours: DecoderLayer, x: Tensor) -> HuggingFaceLayer:
    """Hugging Face's layer with our weights."""
    from transformers import AutoConfig
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2

    fields = {k: v for k, v in to_hf_config(config).items() if k not in ("architectures", "model_type")}
    theirs = AutoConfig.for_model(config.model_type, **fields)
    theirs._attn_implementation, theirs._experts_implementation = "sdpa", "grouped_mm"
    layers = {"mixtral": mixtral.MixtralDecoderLayer, "qwen2_moe": qwen2.Qwen2MoeDecoderLayer}
    rotary = {"mixtral": mixtral.MixtralRotaryEmbedding, "qwen2_moe": qwen2.Qwen2MoeRotaryEmbedding}
    with torch.device(ctx.device), default_dtype(x.dtype):
        layer = layers[config.model_type](theirs, 0)
    _randomize(layer)
    shares = _copy_weights(ours, layer)
    with torch.no_grad():
        tables = rotary[config.model_type](theirs).to(ctx.device)(x, torch.arange(x.shape[1], device=ctx.device)[None])
    return HuggingFaceLayer(layer.to(x.dtype).train(), tables, theirs, shares)


@torch.no_grad()
def _copy_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    """Copies weights by name; returns whether each one was found."""
    known = dict(ours.named_parameters())
    whole = True
    for name, parameter in theirs.named_parameters():
        gate, up = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
        if name in known and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
        elif "gate_up_proj" in name and gate in known and up in known:
            half = parameter.shape[1] // 2
            parameter[:, :half].copy_(known[gate])
            parameter[:, half:].copy_(known[up])
        else:
            whole = False
            print(f"{name} {list(parameter.shape)} has no counterpart in ours")
    return whole


def layer_flops(config: MoEConfig, tokens: int) -> float:
    """Of a forward and a backward of one layer on a row of so many tokens."""
    head = 2 * config.vocab_size * config.hidden_size
    return 3 * tokens * (config.forward_flops_per_token(tokens) - head)


def products(config: MoEConfig, tokens: int) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of each matrix product of the forward pass, with each expert's rows in one piece."""
    hidden, rows = config.hidden_size, tokens * config.num_experts_per_tok
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    found = [(tokens, hidden, q + 2 * kv), (tokens, q, hidden)]
    found += [(rows, hidden, 2 * config.moe_intermediate_size), (rows, config.moe_intermediate_size, hidden)]
    if shared := config.shared_expert_intermediate_size:
        found += [(tokens, hidden, 2 * shared), (tokens, shared, hidden)]
    return found
