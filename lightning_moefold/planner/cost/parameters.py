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
    d, (q, kv) = model.hidden_size, _widths(model, tp)
    biases, norms = model.qkv_bias, 2 * model.qk_norm
    return _counted(
        ((q, d), 1), ((kv, d), 2), ((d, q), 1), ((d,), 2 + model.output_bias), ((q,), biases), ((kv,), 2 * biases),
        ((model.head_dim,), norms),
    )  # fmt: skip


def _widths(model: MoEConfig, tp: int) -> tuple[int, int]:
    """Returns the widths of a rank's queries and of its keys."""
    heads = (model.num_attention_heads, model.num_key_value_heads)
    q, kv = (n * model.head_dim // (tp if n % tp == 0 else 1) for n in heads)
    return q, kv


def gated_shapes(model: MoEConfig, width: int, tp: int) -> Shapes:
    """Returns the shapes of a dense gated feed-forward layer."""
    f, d = ceil(width / tp), model.hidden_size
    return _counted(((f, d), 2), ((d, f), 1))


def dense_shapes(model: MoEConfig, tp: int, layers: RankLayers) -> Shapes:
    """Returns the shapes of a pipeline rank's layers and ends, without routed experts."""
    shared = model.shared_expert_intermediate_size
    return _merged(
        (attention_shapes(model, tp), layers.layers),
        (router_shapes(model, layers.moe), 1),
        (gated_shapes(model, shared, tp), layers.moe),
        (_counted(((1, model.hidden_size), bool(shared))), layers.moe),
        (gated_shapes(model, model.intermediate_size, tp), layers.dense),
        (end_shapes(model, tp, layers), 1),
    )


def router_shapes(model: MoEConfig, layers: int) -> Shapes:
    """Returns the shapes of the routers of ``layers`` layers with experts."""
    return {(model.num_experts, model.hidden_size): layers} if layers else {}


def end_shapes(model: MoEConfig, tp: int, layers: RankLayers) -> Shapes:
    """Returns the shapes of embedding, head and final norm, if the rank holds them."""
    matrices = layers.first + layers.last - (layers.first and layers.last and model.tie_word_embeddings)
    d = model.hidden_size
    return _counted(((ceil(model.vocab_size / tp), d), matrices), ((d,), layers.last))


def expert_shapes(model: MoEConfig, ep: int, etp: int, layers: int) -> Shapes:
    """Returns the shapes of the stacks of routed experts in ``layers`` layers."""
    local, f, d = model.num_experts // ep, ceil(model.moe_intermediate_size / etp), model.hidden_size
    return _counted(((local, f, d), 2 * layers), ((local, d, f), layers))


def without(shapes: Shapes, others: Shapes) -> Shapes:
    """Returns the shapes of the parameters that are not among ``others``."""
    left = {shape: number - others.get(shape, 0) for shape, number in shapes.items()}
    return {shape: number for shape, number in left.items() if number}


def quantized_shapes(model: MoEConfig, tp: int, layers: RankLayers) -> Shapes:
    """Returns the shapes of the dense matrices that ``quantize`` stores in fewer bytes; of experts it stores all."""
    return _merged(
        ({s: n for s, n in attention_shapes(model, tp).items() if len(s) == 2}, layers.layers),
        (gated_shapes(model, model.shared_expert_intermediate_size, tp), layers.moe),
        (gated_shapes(model, model.intermediate_size, tp), layers.dense),
    )


def adapter_parameters(model: MoEConfig, tp: int, layers: int, rank: int) -> int:
    """Returns the parameters of LoRA on all attention projections of ``layers`` layers, on one tp rank.

    Where tp cuts the rows of a weight, A is whole and B is cut; where it cuts the columns, A is cut and B is whole.
    """
    q, kv = _widths(model, tp)
    return layers * rank * (4 * model.hidden_size + 2 * q + 2 * kv)


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


def _counted(*parameters: tuple[tuple[int, ...], int]) -> Shapes:
    """Adds up how many parameters have each shape; empty ones are left out."""
    shapes: Shapes = {}
    for shape, times in parameters:
        if times and 0 not in shape:
            shapes[shape] = shapes.get(shape, 0) + times
    return shapes


def _merged(*parts: tuple[Shapes, int]) -> Shapes:
    """Joins shapes, each multiplied by its number."""
    return _counted(*((shape, number * times) for shapes, times in parts for shape, number in shapes.items()))
