# SPDX-License-Identifier: Apache-2.0
"""CAMERA (arXiv 2508.02322): the energy of every micro-expert of a model on calibration rows.

Micro-expert j of expert e is row j of its gate and up projections with column j of its down projection. With
``phi_tj = p_te * act(g_ej x_t) * (u_ej x_t)``, where p is the router weight as the model uses it (0 where e was not chosen,
the sigmoid of the gate for a shared expert)::

    energy_ej = ((1 - alpha) * sum_t phi_tj^2 + alpha * max_t phi_tj^2) * |down_ej|^2

Sums are float64, over the tokens of all ranks. Layers come one after the other. With a ratio, each layer is pruned at it
before the rows go on to the next, so later energies are those of a model whose earlier layers are pruned.

Legend: E experts, F expert width, S width of the shared expert, T tokens of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_moefold.compression.draft import Draft, digest_of
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.observed import MicroExpertSums, Observer, observe, reduce_all
from lightning_moefold.compression.ranking import Kept, check_ratio, keep_by_layer
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
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.base import local

#: Called after each layer with the number of layers done and of all layers.
Progress = Callable[[int, int], None]


class LayerEnergy(NamedTuple):
    """Energies of a layer.

    Args:
        energy_EF: Of routed experts, float64.
        shared_S: Of the shared expert, float64.
        load_E: Tokens of each expert, int64.
    """

    energy_EF: NDArray[np.float64]
    shared_S: NDArray[np.float64]
    load_E: NDArray[np.int64]


@torch.no_grad()
def analyze(
    checkpoint: str | Path,
    rows: CalibrationRows,
    computing: Computing = Computing(),
    *,
    ratio: float | None = None,
    alpha: float = 0.9,
    draft: Path | None = None,
    save_every: float = 60.0,
    progress: Progress = lambda done, total: None,
) -> Energies:
    """Computes the energies of a checkpoint. Collective: all ranks of the fold call it.

    Args:
        checkpoint: Directory in Hugging Face format, or a name on the hub.
        rows: Calibration rows, the same on every rank; padding counts nowhere.
        computing: Where and in what precision layers run.
        ratio: Share of channels that is pruned from each layer before the next is analysed; None for the dense model.
        alpha: Weight of the maximum over tokens, from 0 to 1.
        draft: Directory in which an interrupted analysis leaves what it has, and from which the same analysis goes on;
            removed at the end. None to keep nothing.
        save_every: Seconds between two saves of the draft.
        progress: Called on every rank after each layer.

    Returns:
        The energies, the same on every rank.

    Raises:
        InputError: If the model has no experts or computes NaN, or an argument cannot be used.
    """
    if ratio is not None:
        check_ratio(ratio)
    if not 0 <= alpha <= 1:
        raise InputError(f"--alpha {alpha} must lie from 0 to 1.")
    stream, world = LayerStream(checkpoint, computing), world_of(computing)
    layers, fold = stream.config.num_hidden_layers, "" if computing.mesh is None else str(computing.mesh.fold)
    kind = str(computing.dtype).removeprefix("torch.")
    key = digest_of(
        stream.source.fingerprint(), rows.token_NS, rows.mask_NS, rows.document_NS, ratio, alpha, fold, kind,
        computing.batch_size,
    )  # fmt: skip
    kept = None if draft is None else Draft(draft, key, world, save_every)
    found: list[LayerEnergy] = []
    done, hidden = 0, None
    if kept is not None:
        done, saved, hidden = kept.resume(computing.device)
        found = [LayerEnergy(*saved[i : i + 3]) for i in range(0, len(saved), 3)]
    if hidden is None:
        hidden = stream.embed(rows)
    for index in range(done, layers):
        if stream.config.is_moe_layer(index):
            found.append(_analyze_layer(stream, index, rows, hidden, ratio, alpha))
            check_finite(index, computing, found[-1].energy_EF, found[-1].shared_S)
        else:
            stream.run(stream.layer(index), rows, hidden)
        progress(index + 1, layers)
        if kept is not None and index + 1 < layers:
            kept.save(index + 1, [array for layer in found for array in layer], hidden)
    stream.close()
    if kept is not None:
        kept.remove()
    return Energies(
        energy=np.stack([layer.energy_EF for layer in found]),
        shared_energy=np.stack([layer.shared_S for layer in found]),
        load=np.stack([layer.load_E for layer in found]),
        layers=np.array(stream.moe_layers),
        checkpoint=stream.source.fingerprint(),
        ratio=float("nan") if ratio is None else ratio,
        alpha=alpha,
        tokens=rows.tokens,
        rows=len(rows.token_NS),
        fold=fold or "one process",
        dtype=kind,
    )


def _analyze_layer(
    stream: LayerStream, index: int, rows: CalibrationRows, hidden: list[Tensor], ratio: float | None, alpha: float
) -> LayerEnergy:
    """Analyses a layer, and replaces the hidden states by those after it, pruned at a ratio."""
    config, world = stream.config, world_of(stream.computing)
    sums = MicroExpertSums(
        config.num_experts,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        stream.computing.device,
    )
    layer = stream.layer(index, partial(observe, observer=sums))
    moe = layer.mlp
    assert isinstance(moe, MoELayer)
    if ratio is None:
        stream.run(layer, rows, hidden)
        sums.reduce(world)
        return _energy(moe, sums, alpha, stream.computing)
    for number, batch in enumerate(stream.batches(rows)):
        hidden[number] = attend(layer, hidden[number], batch.sequence)
        feed(layer, hidden[number], batch.sequence)
    sums.reduce(world)
    energy = _energy(moe, sums, alpha, stream.computing)
    _prune(moe, keep_by_layer(energy.energy_EF, energy.shared_S, ratio), stream.computing)
    silent = Observer()
    for part in (moe.experts, moe.shared_expert):
        if part is not None:
            part.observer = silent  # type: ignore[assignment]  # observe() has put it there
    for number, batch in enumerate(stream.batches(rows)):
        hidden[number] = feed(layer, hidden[number], batch.sequence)
    return energy


def _energy(moe: MoELayer, sums: MicroExpertSums, alpha: float, computing: Computing) -> LayerEnergy:
    norm_EF, norm_S = torch.zeros_like(sums.square_EF), torch.zeros_like(sums.shared_square_F)
    experts, channels, shared = _places(moe, computing)
    norm_EF[experts, channels] = local(moe.experts.get_parameter("down_proj")).double().square().sum(1)
    if moe.shared_expert is not None:
        norm_S[shared] = local(moe.shared_expert.down_proj.weight).double().square().sum(0)
    reduce_all([norm_EF, norm_S], world_of(computing), dist.ReduceOp.MAX)  # replicas have the same
    energy_EF = ((1 - alpha) * sums.square_EF + alpha * sums.most_EF) * norm_EF
    shared_S = ((1 - alpha) * sums.shared_square_F + alpha * sums.shared_most_F) * norm_S
    return LayerEnergy(energy_EF.cpu().numpy(), shared_S.cpu().numpy(), sums.load_E.long().cpu().numpy())


def _prune(moe: MoELayer, kept: Kept, computing: Computing) -> None:
    """Zeroes the down columns of pruned channels, which takes the channels out of the output."""
    experts, channels, shared = _places(moe, computing)
    kept_LF = torch.from_numpy(kept.routed_EF[experts, channels]).to(computing.device)
    local(moe.experts.get_parameter("down_proj")).mul_(kept_LF.unsqueeze(1))
    if moe.shared_expert is not None:
        kept_F = torch.from_numpy(kept.shared_S[shared]).to(computing.device)
        local(moe.shared_expert.down_proj.weight).mul_(kept_F)


def _places(moe: MoELayer, computing: Computing) -> tuple[slice, slice, slice]:
    """Returns this rank's experts, its channels of them, and its channels of the shared expert."""
    mesh = computing.mesh
    count, _, width = moe.experts.get_parameter("down_proj").shape
    shared = 0 if moe.shared_expert is None else moe.shared_expert.down_proj.weight.shape[1]
    ep, etp, tp = (0, 0, 0) if mesh is None else (mesh.ep.index, mesh.etp.index, mesh.tp.index)
    return tuple(slice(i * n, (i + 1) * n) for i, n in ((ep, count), (etp, width), (tp, shared)))  # type: ignore[return-value]
