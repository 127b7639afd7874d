# SPDX-License-Identifier: Apache-2.0
"""Prunes whole experts by a score: the same number from every layer, so that the result is an ordinary smaller checkpoint.

Legend: L MoE layers, E experts, T tokens of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.compression.analysis import Progress
from lightning_moefold.compression.observed import Observer, observe
from lightning_moefold.compression.ranking import check_ratio
from lightning_moefold.compression.rewrite import read_plain_config, rewrite
from lightning_moefold.compression.scores import ExpertScore, ExpertSums, expert_score, experts_to_keep
from lightning_moefold.compression.stream import (
    CalibrationRows,
    Computing,
    LayerStream,
    attend,
    check_finite,
    feed,
    world_of,
)
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoEConfig
from lightning_moefold.modules import MoELayer


@torch.no_grad()
def score_experts(
    checkpoint: str | Path,
    rows: CalibrationRows,
    computing: Computing = Computing(),
    *,
    score: str = "reap",
    progress: Progress = lambda done, total: None,
) -> dict[int, NDArray[np.float64]]:
    """Scores the experts of a checkpoint. Collective: all ranks of the fold call it.

    Args:
        checkpoint: Directory in Hugging Face format, or a name on the hub.
        rows: Calibration rows, the same on every rank; padding counts nowhere.
        computing: Where and in what precision layers run.
        score: A name in :data:`~.scores.EXPERT_SCORES`.
        progress: Called on every rank after each layer.

    Returns:
        Scores ``[E]`` by the number of the layer, the same on every rank.

    Raises:
        InputError: If the score is unknown, or the model has no experts or computes NaN.
    """
    function = expert_score(score)
    stream = LayerStream(checkpoint, computing)
    layers, found, hidden = stream.config.num_hidden_layers, {}, stream.embed(rows)
    for index in range(layers):
        if stream.config.is_moe_layer(index):
            found[index] = _score_layer(stream, index, rows, hidden, function)
            check_finite(index, computing, found[index])
        else:
            stream.run(stream.layer(index), rows, hidden)
        progress(index + 1, layers)
    stream.close()
    return found


def _score_layer(
    stream: LayerStream, index: int, rows: CalibrationRows, hidden: list[Tensor], score: ExpertScore
) -> NDArray[np.float64]:
    """Scores a layer, and replaces the hidden states by those after it.

    A model that does not normalise its router weights runs its experts twice: once with normalised weights, to be scored, and
    once as it is.
    """
    config = stream.config
    sums = ExpertSums(config.num_experts, config.hidden_size, stream.computing.device)
    layer = stream.layer(index, partial(observe, observer=sums))
    moe = layer.mlp
    assert isinstance(moe, MoELayer)
    options = moe.gate.options
    twice = not options.softmax_after_topk and options.norm_topk_prob is False
    for number, batch in enumerate(stream.batches(rows)):
        x_TD = attend(layer, hidden[number], batch.sequence)
        if twice:
            moe.gate.options = replace(options, norm_topk_prob=True)
            feed(layer, x_TD, batch.sequence)
            moe.gate.options, moe.experts.observer = options, Observer()  # type: ignore[assignment]
        hidden[number] = feed(layer, x_TD, batch.sequence)
        moe.experts.observer = sums  # type: ignore[assignment]
    sums.reduce(world_of(stream.computing))
    return score(sums).cpu().numpy()


def number_to_keep(config: MoEConfig, keep: float) -> int:
    """Returns how many experts of a layer stay.

    Raises:
        InputError: If it is all of them, or fewer than a token needs.
    """
    count = round(check_ratio(keep, "--keep") * config.num_experts)
    if count >= config.num_experts:
        raise InputError(f"--keep {keep} keeps all {config.num_experts} experts of a layer; use a smaller share.")
    if count < config.num_experts_per_tok:
        least = config.num_experts_per_tok / config.num_experts
        raise InputError(
            f"--keep {keep} leaves {count} of {config.num_experts} experts, but a token needs {config.num_experts_per_tok}; use "
            f"{least:.3g} or more."
        )
    return count


def prune_experts(
    checkpoint: str | Path, scores: Mapping[int, NDArray[np.float64]], output: str | Path, keep: float
) -> dict[int, NDArray[np.int64]]:
    """Writes the checkpoint with the best experts of each layer, and their router rows, in one process.

    Args:
        checkpoint: Directory that was scored.
        scores: Result of :func:`score_experts`.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        keep: Share of experts that stay.

    Returns:
        The experts that stay, by layer, in their order.

    Raises:
        InputError: If the share cannot be.
    """
    path = local_directory(checkpoint)
    config = read_plain_config(path)
    count = number_to_keep(config, keep)
    smaller = replace(config, num_experts=count)
    kept = {layer: experts_to_keep(score_E, count) for layer, score_E in scores.items()}

    def change(name: str, value: Tensor) -> Tensor:
        parts = name.split(".")
        if parts[3:5] not in (["mlp", "experts"], ["mlp", "gate"]) or int(parts[2]) not in kept:
            return value
        return value.index_select(0, torch.from_numpy(kept[int(parts[2])]))

    rewrite(path, output, smaller, change)
    return kept
