# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of all parameters, in the model and on disk. Pure Python.

Names in the model follow transformers' module paths, except that the experts of a layer are three stacks with an expert
axis::

    model.layers.3.mlp.experts.gate_proj  [E, F, D]   <- model.layers.3.mlp.experts.{0..E-1}.gate_proj.weight  [F, D]

On disk, Mixtral's names have ``block_sparse_moe`` for ``mlp``, and ``w1 w3 w2`` for gate, up and down. ``transformers``
5 can also write the experts of a layer in one tensor, as it holds them in memory::

    model.layers.3.mlp.experts.gate_up_proj  [E, 2F, D]
    model.layers.3.mlp.experts.down_proj     [E, D, F]

The packed form of a pruned model has the channels of all experts of a layer one after the other, in memory and on disk::

    model.layers.3.mlp.experts.{gate,up,down}_proj  [W, D]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lightning_moefold.errors import ConfigError
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.families import registered_family

_MIXTRAL_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class ParameterEntry:
    """A parameter of the model, and the tensors on disk that hold it.

    Args:
        shape: Global shape of the parameter.
        sources: Names on disk: one name, or one for each index of the first dimension.
        stacked: Whether each index of the first dimension has its own source.
        halves: Number of equal parts into which the second dimension of the source is divided; the parameter is one of
            them.
        half: Index of the parameter's part.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stacked: bool = False
    halves: int = 1
    half: int = 0

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each source on disk."""
        if self.halves > 1:
            return (self.shape[0], self.halves * self.shape[1], *self.shape[2:])
        return self.shape[1:] if self.stacked else self.shape

    def source_slices(self, slices: tuple[slice, ...]) -> tuple[slice, ...]:
        """Converts slices of the parameter to slices of its source, if it is not stacked."""
        if self.halves == 1:
            return slices
        start = self.half * self.shape[1]
        return (slices[0], slice(start + slices[1].start, start + slices[1].stop), *slices[2:])


def parameter_entries(config: MoEConfig) -> dict[str, ParameterEntry]:
    """Lists all parameters of a model of ``config`` by their names in the model, in the order of the layers.

    A tied head is not listed, because it is the embedding.
    """
    return _as_stored(config, base_entries(config))


def base_entries(config: MoEConfig) -> dict[str, ParameterEntry]:
    """Lists the same, with the names on disk of the known family, whatever family is registered on top of it."""
    d = config.hidden_size
    entries = {"model.embed_tokens.weight": _single("model.embed_tokens.weight", config.vocab_size, d)}
    for index in range(config.num_hidden_layers):
        entries |= _layer_entries(config, index)
    entries["model.norm.weight"] = _single("model.norm.weight", d)
    if not config.tie_word_embeddings:
        entries["lm_head.weight"] = _single("lm_head.weight", config.vocab_size, d)
    return entries


def bias_entries(config: MoEConfig) -> dict[str, ParameterEntry]:
    """Lists the expert biases of routers, which are buffers, under DeepSeek-V3's name, on disk too.

    ``transformers`` does not have them in these families, so a checkpoint may lack them.
    """
    if config.router.bias_update_rate is None:
        return {}
    names = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(config.num_hidden_layers)]
    return {name: _single(name, config.num_experts) for i, name in enumerate(names) if config.is_moe_layer(i)}


def _single(name: str, *shape: int) -> ParameterEntry:
    return ParameterEntry(shape, (name,))


def _layer_entries(config: MoEConfig, index: int) -> dict[str, ParameterEntry]:
    layer, d, h = f"model.layers.{index}", config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * h, config.num_key_value_heads * h
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "post_attention_layernorm.weight": (d,),
    }
    if config.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (d,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    if not config.is_moe_layer(index):
        shapes |= _gated("mlp", d, config.intermediate_size)
    elif width := config.shared_width(index):
        shapes |= _gated("mlp.shared_expert", d, width)
        shapes["mlp.shared_expert_gate.weight"] = (1, d)
    entries = {f"{layer}.{name}": _single(f"{layer}.{name}", *shape) for name, shape in shapes.items()}
    if config.is_moe_layer(index):
        entries |= _moe_entries(config, index)
    return entries


def _gated(prefix: str, d: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, d),
        f"{prefix}.up_proj.weight": (width, d),
        f"{prefix}.down_proj.weight": (d, width),
    }


def _moe_entries(config: MoEConfig, index: int) -> dict[str, ParameterEntry]:
    layer, mixtral = f"model.layers.{index}", config.model_type == "mixtral"
    e, f, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
    block = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
    entries = {f"{layer}.mlp.gate.weight": _single(f"{block}.gate.weight", e, d)}
    if config.packed_widths:
        names = [f"{layer}.mlp.experts.{part}" for part in _MIXTRAL_EXPERT]
        return entries | {name: _single(name, sum(config.packed_widths[index]), d) for name in names}
    for name, shape in (("gate_proj", (e, f, d)), ("up_proj", (e, f, d)), ("down_proj", (e, d, f))):
        part = _MIXTRAL_EXPERT[name] if mixtral else name
        sources = tuple(f"{block}.experts.{i}.{part}.weight" for i in range(e))
        entries[f"{layer}.mlp.experts.{name}"] = ParameterEntry(shape, sources, stacked=True)
    return entries


def entries_on_disk(config: MoEConfig, stored: Collection[str]) -> dict[str, ParameterEntry]:
    """Lists all parameters with the sources that a checkpoint with the tensors ``stored`` has for them.

    Sources may differ from those that are written: the experts of a layer may be in one tensor, and Mixtral's blocks
    may be called ``mlp``.
    """
    entries = base_entries(config)
    for index in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        block = f"model.layers.{index}.mlp"
        fused, down = f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"
        if disk_name(config, fused) in stored:
            for half, name in enumerate(("gate_proj", "up_proj")):
                shape = entries[f"{block}.experts.{name}"].shape
                entries[f"{block}.experts.{name}"] = ParameterEntry(shape, (fused,), halves=2, half=half)
            entries[down] = _single(down, *entries[down].shape)
        for name in (f"{block}.gate.weight", *(f"{block}.experts.{part}" for part in _MIXTRAL_EXPERT)):
            renamed = tuple(source.replace(".block_sparse_moe.", ".mlp.") for source in entries[name].sources)
            if disk_name(config, renamed[0]) in stored:
                entries[name] = replace(entries[name], sources=renamed)
    return _as_stored(config, entries)


def disk_name(config: MoEConfig, name: str) -> str:
    """Returns the name on disk of a tensor that the known family calls ``name``."""
    family = registered_family(config.family)
    return name if family is None else family.disk_name(name)


def _as_stored(config: MoEConfig, entries: dict[str, ParameterEntry]) -> dict[str, ParameterEntry]:
    """Renames the sources to what the configuration's own family calls them.

    Raises:
        ConfigError: If two tensors would have the same name.
    """
    family = registered_family(config.family)
    if family is None:
        return entries
    named = {n: replace(e, sources=tuple(map(family.disk_name, e.sources))) for n, e in entries.items()}
    before, after = ({source for e in found.values() for source in e.sources} for found in (entries, named))
    if len(after) < len(before):
        raise ConfigError(
            f"the names registered for {family.model_type!r} give two tensors the same name; change them."
        )
    return named
