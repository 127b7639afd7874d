# SPDX-License-Identifier: Apache-2.0
"""MoEConfig: the configuration of a Mixtral, Qwen2-MoE or Qwen3-MoE model, read from ``config.json``. Pure Python.

Old and new spellings are read (``rope_theta`` or ``rope_parameters``, ``num_experts`` or ``num_local_experts``,
``torch_dtype`` or ``dtype``). A field that changes the result is honoured or refused by name; defaults are those of
``transformers``' own configuration classes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.errors import ConfigError
from lightning_moefold.models.families import FAMILIES
from lightning_moefold.models.fields import (
    ABOVE_ZERO,
    BOOLEAN,
    COUNT,
    INTEGER,
    INTEGERS,
    NOT_NEGATIVE,
    NUMBER,
    NUMEROUS,
    POSITIVE,
    STRING,
)
from lightning_moefold.modules.routers.options import RouterOptions

AuxLoss = Literal["huggingface", "microbatch", "sequence", "global_batch"]
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")

#: Fields that do not change what training computes.
NEUTRAL = frozenset(
    (
        "_name_or_path", "add_cross_attention", "architectures", "auto_map", "bad_words_ids",
        "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
        "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "eos_token_id",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
        "length_penalty", "max_length", "max_position_embeddings", "min_length", "model_type",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
        "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
        "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
        "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
        "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
        "initializer_range", "tie_last_hidden_states", "num_labels",
    )
)  # fmt: skip

#: The kind of value that each field of :class:`MoEConfig` may hold.
KINDS = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "moe_intermediate_size",
            "num_experts_per_tok", "decoder_sparse_step",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("num_hidden_layers", "num_experts"), NUMEROUS),
    **dict.fromkeys(("intermediate_size", "shared_expert_intermediate_size"), COUNT),
    **dict.fromkeys(
        ("norm_topk_prob", "qkv_bias", "output_bias", "qk_norm", "tie_word_embeddings", "output_router_logits"), BOOLEAN
    ),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), NOT_NEGATIVE),
    **dict.fromkeys(("rope_theta", "rope_scaling_factor"), ABOVE_ZERO),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef"), NUMBER),
    **dict.fromkeys(("model_type", "hidden_act", "aux_loss"), STRING),
    "mlp_only_layers": INTEGERS,
    "pad_token_id": INTEGER.or_null,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Configuration of a decoder-only MoE language model. Fields that ``transformers`` also has bear its names.

    Args:
        model_type: ``"mixtral"``, ``"qwen2_moe"`` or ``"qwen3_moe"``.
        vocab_size: Number of tokens in the vocabulary, V.
        hidden_size: Size of hidden states, D.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads.
        head_dim: Size of a head.
        intermediate_size: Width of *dense* feed-forward layers; 0 if the family has none.
        moe_intermediate_size: Width of one routed expert.
        shared_expert_intermediate_size: Width of the shared expert; 0 for none.
        num_experts: Number of routed experts per MoE layer.
        num_experts_per_tok: Number of experts per token.
        norm_topk_prob: Whether a token's weights are divided by their sum.
        decoder_sparse_step: Layer i is MoE only if ``(i + 1) % decoder_sparse_step == 0``.
        mlp_only_layers: Layers that are dense whatever ``decoder_sparse_step`` says.
        qkv_bias: Whether the projections q, k, v have biases.
        output_bias: Whether the projection o has a bias.
        qk_norm: Whether RMSNorm is applied to every query and key head.
        rms_norm_eps: Epsilon of every norm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling_factor: Factor of linear position interpolation; 1 for none.
        sliding_windows: Attention window of each layer; None if the layer sees all positions.
        tie_word_embeddings: Whether head and embedding are one parameter.
        pad_token_id: Token whose embedding gets no gradient.
        hidden_act: Activation of all feed-forward layers.
        router_aux_loss_coef: Weight of the load-balancing loss.
        output_router_logits: Whether the load-balancing loss is added to the loss, as in ``transformers``.
        aux_loss: Tokens over which the load-balancing loss is computed. ``"huggingface"``: those of a micro-batch,
            pooled over all layers, as in ``transformers`` and only with ``output_router_logits``. The others treat each
            layer by itself: ``"microbatch"`` the tokens of a micro-batch, ``"sequence"`` those of a row,
            ``"global_batch"`` those of the whole batch.
        router_z_loss_coef: Weight of the z-loss; 0 for none.
        router: Options of the router, which chooses experts.
        initializer_range: Standard deviation of initial weights.
        packed_widths: Widths of the experts of each layer, if they differ, and ``()`` for a dense layer; empty if all experts
            have the width ``moe_intermediate_size``.
        packed_shared_widths: Width of each layer's shared expert in a packed model.
        dtype: Data type of the stored weights, as a name such as ``"bfloat16"``; None if the file does not say.
        family: The family under whose names it is read and written, if it is one that
            :func:`~.families.register_family` has registered on top of ``model_type``.
        raw: The configuration dictionary as read, without overrides; :func:`~.hf_config.written_config` returns what is
            written.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0
    sliding_windows: tuple[int | None, ...] = ()
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    hidden_act: str = "silu"
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    aux_loss: AuxLoss = "huggingface"
    router_z_loss_coef: float = 0.0
    router: RouterOptions = RouterOptions()
    initializer_range: float = 0.02
    packed_widths: tuple[tuple[int, ...], ...] = ()
    packed_shared_widths: tuple[int, ...] = ()
    dtype: str | None = None
    family: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            kind.check(name, getattr(self, name))
        if self.model_type not in FAMILIES:
            raise ConfigError(
                f"model_type={self.model_type!r} is not supported; the supported architectures are {', '.join(FAMILIES)}."
            )
        if self.dtype not in (None, *_DTYPES):
            raise ConfigError(f"dtype={self.dtype!r} is not supported; weights are {', '.join(_DTYPES)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_attention_heads}."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}."
            )
        if self.aux_loss not in get_args(AuxLoss):
            raise ConfigError(
                f"aux_loss={self.aux_loss!r} is not known; use one of {', '.join(map(repr, get_args(AuxLoss)))}."
            )
        if self.num_moe_layers:
            try:
                self.router.check(self.num_experts, self.num_experts_per_tok)
            except ValueError as error:
                raise ConfigError(f"router: {error}") from None
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd, but rotary embedding rotates pairs; use an even head_dim."
            )
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id={self.pad_token_id} lies outside the vocabulary of vocab_size={self.vocab_size}."
            )
        if self.pad_token_id is not None and self.pad_token_id < 0:  # counts from the end, as in torch.nn.Embedding
            object.__setattr__(self, "pad_token_id", self.vocab_size + self.pad_token_id)
        if self.hidden_act not in _ACTIVATIONS:
            raise ConfigError(f"hidden_act={self.hidden_act!r} is not supported; use one of {', '.join(_ACTIVATIONS)}.")
        # For any number of layers, because dataclasses.replace keeps this field.
        if all(window is None for window in self.sliding_windows):
            object.__setattr__(self, "sliding_windows", (None,) * self.num_hidden_layers)
        if len(self.sliding_windows) != self.num_hidden_layers:
            raise ConfigError(
                f"sliding_windows names {len(self.sliding_windows)} layers, but num_hidden_layers={self.num_hidden_layers}."
            )
        for window in self.sliding_windows:
            POSITIVE.or_null.check("sliding_windows", window)
        if self.packed_widths:
            self._check_packed()

    def _check_packed(self) -> None:
        expected = [self.num_experts if self.is_moe_layer(i) else 0 for i in range(self.num_hidden_layers)]
        if list(map(len, self.packed_widths)) != expected or len(self.packed_shared_widths) != self.num_hidden_layers:
            raise ConfigError(
                f"expert_widths must hold {self.num_experts} widths for each of the {self.num_hidden_layers} layers, none for "
                "dense ones, and shared_expert_widths one for each layer."
            )
        INTEGERS.check("shared_expert_widths", self.packed_shared_widths)
        for widths in (*self.packed_widths, self.packed_shared_widths):
            INTEGERS.check("expert_widths", widths)
            if any(width < 0 for width in widths):
                raise ConfigError(f"expert_widths={list(widths)} must be 0 or more.")

    # ---- structure ---------------------------------------------------------------------------------------------

    @property
    def is_packed(self) -> bool:
        """Whether experts have widths of their own."""
        return bool(self.packed_widths)

    def mean_width(self, index: int) -> float:
        """Returns the mean width of the experts of layer ``index``."""
        if not self.packed_widths:
            return self.moe_intermediate_size
        return sum(self.packed_widths[index]) / self.num_experts

    def shared_width(self, index: int) -> int:
        """Returns the width of the shared expert of layer ``index``; 0 for none."""
        return self.packed_shared_widths[index] if self.packed_widths else self.shared_expert_intermediate_size

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer ``index`` has experts (otherwise it is dense)."""
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    @property
    def wants_aux_loss(self) -> bool:
        """Whether the load-balancing loss is computed: if it is on, or ``aux_loss`` is one that ``transformers`` does not have."""
        return self.num_moe_layers > 0 and (self.output_router_logits or self.aux_loss != "huggingface")

    @property
    def wants_z_loss(self) -> bool:
        """Whether the z-loss is computed."""
        return self.num_moe_layers > 0 and self.router_z_loss_coef != 0

    @property
    def dense_widths(self) -> dict[str, int]:
        """Widths of dense feed-forward layers, which are cut over tp, by config field."""
        widths = {}
        if self.num_moe_layers < self.num_hidden_layers:
            widths["intermediate_size"] = self.intermediate_size
        if self.shared_expert_intermediate_size and self.num_moe_layers and not self.is_packed:
            widths["shared_expert_intermediate_size"] = self.shared_expert_intermediate_size
        return widths

    @property
    def expert_widths(self) -> dict[str, int]:
        """Widths of experts, which are cut over etp, by config field."""
        name = "intermediate_size" if self.model_type == "mixtral" else "moe_intermediate_size"
        return {name: self.moe_intermediate_size} if self.num_moe_layers and not self.is_packed else {}

    # ---- size and work -----------------------------------------------------------------------------------------

    def _matrices(self, index: int, active: bool) -> float:
        """Returns the numbers in all matrices of a decoder layer; with ``active``, only in those that a token uses."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        total = float(self.hidden_size * (2 * q + 2 * kv))
        if not self.is_moe_layer(index):
            return total + 3 * self.hidden_size * self.intermediate_size
        experts = self.num_experts_per_tok if active else self.num_experts
        total += self.hidden_size * self.num_experts + 3 * self.hidden_size * experts * self.mean_width(index)
        if shared := self.shared_width(index):
            total += 3 * self.hidden_size * shared + self.hidden_size
        return total

    def layer_parameters(self, index: int, *, active: bool = False) -> int:
        """Returns the number of parameters in a decoder layer; with ``active``, only those that a token uses."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        vectors = heads * self.head_dim * self.qkv_bias + self.hidden_size * (2 + self.output_bias)
        return round(self._matrices(index, active)) + vectors + 2 * self.head_dim * self.qk_norm

    def num_parameters(self, *, active: bool = False) -> int:
        """Returns the model's number of parameters; with ``active``, only those that a token uses (with embedding and head)."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return ends + sum(self.layer_parameters(i, active=active) for i in range(self.num_hidden_layers))

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """Returns the matrix-product FLOPs of one token's forward pass: 2 per active weight, plus attention.

        Attention counts the keys that a causal query sees, on average half the sequence (or its window). The embedding
        is a look-up and does not count. Norms, activations and softmax are left out, as is usual for MFU. Backward
        costs twice as many FLOPs.
        """
        layers = range(self.num_hidden_layers)
        weights = self.vocab_size * self.hidden_size + sum(self._matrices(i, active=True) for i in layers)
        keys = sum(self.attended_keys(i, sequence_length) for i in layers)
        return 2 * weights + 2 * 2 * self.num_attention_heads * self.head_dim * keys

    def attended_keys(self, index: int, sequence_length: int) -> float:
        """Returns how many keys a causal query of layer ``index`` sees, on average over a sequence."""
        window = min(self.sliding_windows[index] or sequence_length, sequence_length)
        return window * (1 - (window - 1) / (2 * sequence_length)) if window else 0.0

    # ---- reading -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> MoEConfig:
        """Reads ``config.json`` in the directory ``path``, or of the model of this name on the hub.

        Raises:
            ConfigError: If the file is missing or unreadable, or a field cannot be honoured.
        """
        file = local_directory(path, "config") / "config.json"
        if not file.is_file():
            raise ConfigError(f"{file} does not exist; give a directory in Hugging Face format.")
        try:
            raw = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:  # of JSON, of its encoding, and of a number of too many digits
            raise ConfigError(f"{file} is not valid JSON ({error}).") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{file} does not hold a JSON object.")
        return cls.from_hf(raw, **overrides)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], **overrides: Any) -> MoEConfig:
        """Reads a configuration dictionary in Hugging Face's form.

        Args:
            raw: The dictionary; not changed.
            **overrides: Values that replace its fields, such as ``output_router_logits=True``.

        Raises:
            ConfigError: If the architecture is not supported or a field cannot be honoured.
        """
        from lightning_moefold.models.hf_config import read_hf_config

        config, unknown = read_hf_config(raw, overrides)
        if unknown:
            warnings.warn(
                f"config.json has fields that are not known here and are ignored: {', '.join(sorted(unknown))}.",
                stacklevel=2,
            )
        return config
