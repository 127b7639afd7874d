# SPDX-License-Identifier: Apache-2.0
"""Lists the shapes of one rank's parameters, and their sizes after ``fully_shard``. Pure Python.

The cuts equal those of the modules' own ``plans``, but no module is created, since a search examines thousands of
folds.
"""

from __future__ import annotations

from math import ceil, prod

from lightning_moefold.models.config import MoEConfig
from lightning_moefold.planner.cost.schedules import RankLayers

#: Shapes on the rank with the largest pieces, and how many parameters have each.
Shapes = dict[tuple[int, ...], int]


def attention_shapes(model: MoEConfig, tp: int) -> Shapes:
    """Returns the shapes of attention and both norms of a layer. Projections whose heads tp does not divide are whole."""
    d, size = model.hidden_size, model.head_dim
    q = model.num_attention_heads * size // (tp if model.num_attention_heads % tp == 0 else 1)
    kv = model.num_key_value_heads * size // (tp if model.num_key_value_heads % tp == 0 else 1)
    shapes: Shapes = {}
    _add(shapes, (q, d), 1)
    _add(shapes, (kv, d), 2)
    _add(shapes, (d, q), 1)
    _add(shapes, (d,), 2 + model.output_bias)
    if model.qkv_bias:
        _add(shapes, (q,), 1)
        _add(shapes, (kv,), 2)
    if model.qk_norm:
        _add(shapes, (size,), 2)
    return shapes


def gated_shapes(model: MoEConfig, width: int, tp: int) -> Shapes:
    """Returns the shapes of a dense gated feed-forward layer."""
    f, d = ceil(width / tp), model.hidden_size
    shapes: Shapes = {}
    _add(shapes, (f, d), 2)
    _add(shapes, (d, f), 1)
    return shapes


def dense_shapes(model: MoEConfig, tp: int, layers: RankLayers) -> Shapes:
    """Returns the shapes of a pipeline rank's layers and ends, without routed experts."""
    shapes: Shapes = {}
    d = model.hidden_size
    _merge(shapes, attention_shapes(model, tp), layers.layers)
    _merge(shapes, router_shapes(model, layers.moe), 1)
    if model.shared_expert_intermediate_size:
        _merge(shapes, gated_shapes(model, model.shared_expert_intermediate_size, tp), layers.moe)
        _add(shapes, (1, d), layers.moe)
    _merge(shapes, gated_shapes(model, model.intermediate_size, tp), layers.dense)
    _merge(shapes, end_shapes(model, tp, layers), 1)
    return shapes


def router_shapes(model: MoEConfig, layers: int) -> Shapes:
    """Returns the shapes of the routers of ``layers`` layers with experts."""
    return {(model.num_experts, model.hidden_size): layers} if layers else {}


def end_shapes(model: MoEConfig, tp: int, layers: RankLayers) -> Shapes:
    """Returns the shapes of embedding, head and final norm, if the rank holds them."""
    shapes: Shapes = {}
    matrices = layers.first + layers.last - (layers.first and layers.last and model.tie_word_embeddings)
    _add(shapes, (ceil(model.vocab_size / tp), model.hidden_size), matrices)
    _add(shapes, (model.hidden_size,), layers.last)
    return shapes


def expert_shapes(model: MoEConfig, ep: int, etp: int, layers: int) -> Shapes:
    """Returns the shapes of the stacks of routed experts in ``layers`` layers."""
    local, f, d = model.num_experts // ep, ceil(model.moe_intermediate_size / etp), model.hidden_size
    shapes: Shapes = {}
    _add(shapes, (local, f, d), 2 * layers)
    _add(shapes, (local, d, f), layers)
    return shapes


def without(shapes: Shapes, others: Shapes) -> Shapes:
    """Returns the shapes of the parameters that are not among ``others``."""
    left = {shape: number - others.get(shape, 0) for shape, number in shapes.items()}
    return {shape: number for shape, number in left.items() if number}


def quantized_shapes(model: MoEConfig, tp: int, layers: RankLayers) -> Shapes:
    """Returns the shapes of the dense matrices that ``quantize`` stores in fewer bytes; of experts it stores all."""
    shapes: Shapes = {}
    _merge(shapes, {s: n for s, n in attention_shapes(model, tp).items() if len(s) == 2}, layers.layers)
    if model.shared_expert_intermediate_size:
        _merge(shapes, gated_shapes(model, model.shared_expert_intermediate_size, tp), layers.moe)
    _merge(shapes, gated_shapes(model, model.intermediate_size, tp), layers.dense)
    return shapes


def adapter_parameters(model: MoEConfig, tp: int, layers: int, rank: int) -> int:
    """Returns the parameters of LoRA on all attention projections of ``layers`` layers, on one tp rank.

    Where tp cuts the rows of a weight, A is whole and B is cut; where it cuts the columns, A is cut and B is whole.
    """
    d, size = model.hidden_size, model.head_dim
    q = model.num_attention_heads * size // (tp if model.num_attention_heads % tp == 0 else 1)
    kv = model.num_key_value_heads * size // (tp if model.num_key_value_heads % tp == 0 else 1)
    return layers * rank * (3 * d + q + 2 * kv + q + d)


def count(shapes: Shapes) -> int:
    """Returns how many numbers the parameters have."""
    return sum(prod(shape) * times for shape, times in shapes.items())


def shard(shapes: Shapes, ranks: int, experts: bool = False) -> int:
    """Returns how many numbers the first of ``ranks`` data ranks stores, which has the largest pieces.

    ``fully_shard`` cuts the first dimension into equal pieces, the last ones shorter; stacks of experts are cut along
    the second dimension if ``ranks`` divides it but not the first.
    """
    total = 0
    for shape, times in shapes.items():
        dim = next((i for i in (0, 1) if shape[i] % ranks == 0), 0) if experts else 0
        total += prod(shape) // shape[dim] * ceil(shape[dim] / ranks) * times
    return total


def _add(shapes: Shapes, shape: tuple[int, ...], times: int) -> None:
    if times and 0 not in shape:
        shapes[shape] = shapes.get(shape, 0) + times


def _merge(shapes: Shapes, others: Shapes, times: int) -> None:
    for shape, number in others.items():
        _add(shapes, shape, number * times)
