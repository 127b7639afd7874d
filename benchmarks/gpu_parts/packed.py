# SPDX-License-Identifier: Apache-2.0
"""Rows of several documents and sliding windows, beside one causal row of as many tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.clock import Contender, take_turns
from gpu_parts.layers import clear, make_input, step_of
from gpu_parts.record import Context, free_memory
from gpu_parts.shapes import MODELS, layer_config, our_layer, tokens_of
from lightning_moefold.modules import DecoderLayer
from lightning_moefold.modules.sequence import SequenceBatch

_LENGTHS = (2048, 1024, 512, 3000, 100, 1508)  # 8,192


def run(ctx: Context) -> None:
    """The part."""
    for name in MODELS:
        try:
            _model(ctx, name)
        except Exception as error:
            ctx.record.fail_try(name, error)
        free_memory()


def documents(ctx: Context, rows: int, length: int) -> Tensor:
    """Numbers of documents of mixed lengths, ``[B, S]``."""
    total = rows * length
    scale = total / sum(_LENGTHS)
    ends = torch.tensor(_LENGTHS).cumsum(0).mul(scale).long()
    number_N = torch.searchsorted(ends, torch.arange(total), right=True)
    return number_N.view(rows, length).to(ctx.device)


def _model(ctx: Context, name: str) -> None:
    config = layer_config(ctx, name)
    layer = our_layer(ctx, config)
    x, grad = make_input(ctx, config.hidden_size)
    window = tokens_of(ctx) // 2
    kinds: list[tuple[str, int, bool, int | None]] = [
        ("one causal row", 1, False, None),
        ("one row, 6 documents", 1, True, None),
        ("one row, half of it as window", 1, False, window),
        ("one row, documents and window", 1, True, window),
        ("two rows", 2, False, None),
        ("two rows, documents", 2, True, None),
    ]
    for title, whole in (("attention block alone", False), ("decoder layer", True)):
        if title == "decoder layer":
            kinds = kinds[:3]
        base: list[float] = []
        contenders = [_contender(ctx, layer, x, grad, whole, base, *kind) for kind in kinds]
        take_turns(ctx, f"{title}, forward and backward, bfloat16", contenders, model=name)


def _contender(
    ctx: Context, layer: DecoderLayer, x: Tensor, grad: Tensor, whole: bool, base: list[float], name: str, rows: int,
    packed: bool, window: int | None,
) -> Contender:  # fmt: skip
    length = x.shape[1] // rows
    batch: list[SequenceBatch] = []

    def call(mark: Callable[[], None]) -> None:
        attention = layer.self_attn
        if not batch:  # a model describes it once for all layers
            made = attention.batch_of(x.detach().view(rows, length, -1))
            made.document_BS = documents(ctx, rows, length) if packed else None
            batch.append(made)
        attention.sliding_window = window
        try:
            if whole:
                step_of(layer, x, grad, batch[0])[0](mark)
            else:
                y_TD = attention(x.flatten(0, 1), batch[0])
                mark()
                y_TD.backward(grad.flatten(0, 1))
        finally:
            attention.sliding_window = None

    def cells(ms: float) -> dict[str, Any]:
        if name == "one causal row":
            base.append(ms)
        return {"times one causal row": ms / base[0] if base else None}

    return Contender(name, call, partial(clear, layer, x), cells)
