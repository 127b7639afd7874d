# SPDX-License-Identifier: Apache-2.0
"""Oracles written from the formulas: Hugging Face's model in float64, and a loop over its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.compression.stream import CalibrationRows
from lightning_moefold.testing import hf_reference


def calibration_rows(count: int = 7, length: int = 12, *, padded: bool = True, seed: int = 0) -> CalibrationRows:
    """Rows of random tokens, the last ones shorter, or with padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    token_NS = torch.randint(0, 96, (count, length), generator=generator)
    if not padded:
        return CalibrationRows(token_NS)
    mask_NS = torch.ones_like(token_NS)
    mask_NS[1, length // 2 :] = 0
    mask_NS[2, :3] = 0
    return CalibrationRows(token_NS, mask_NS)


@dataclass
class SeenToken:
    """A token at the experts of a layer: its input, its experts and their weights."""

    x_D: Tensor
    experts: list[int]
    weights: list[float]


def blocks_of(model: Any) -> dict[int, Any]:
    """MoE blocks by layer."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


@torch.no_grad()
def tokens_at(model: Any, index: int, rows: CalibrationRows, *, normalised: bool | None = None) -> list[SeenToken]:
    """The real tokens at the experts of a layer, with the routing of the model written out.

    Args:
        model: Of ``transformers``.
        index: The layer.
        rows: What is read.
        normalised: Whether weights sum to 1; as the model does by default.
    """
    block, inputs = blocks_of(model)[index], []
    hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(rows.token_NS, attention_mask=rows.mask_NS)
    hook.remove()
    mask_NS = torch.ones_like(rows.token_NS) if rows.mask_NS is None else rows.mask_NS
    x_ND, config = inputs[0][mask_NS.bool()], model.config
    if normalised is None:
        normalised = config.model_type == "mixtral" or config.norm_topk_prob
    seen = []
    for x_D in x_ND:
        probability_E = torch.softmax(block.gate.weight @ x_D, 0)
        weight_K, expert_K = probability_E.topk(config.num_experts_per_tok)
        if normalised:
            weight_K = weight_K / weight_K.sum()
        seen.append(SeenToken(x_D, expert_K.tolist(), weight_K.tolist()))
    return seen


def matrices(block: Any, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate ``[F, D]``, up ``[F, D]`` and down ``[D, F]`` of an expert, as views."""
    gate_FD, up_FD = block.experts.gate_up_proj.data[expert].chunk(2)
    return gate_FD, up_FD, block.experts.down_proj.data[expert]


def shared_matrices(block: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same of the shared expert; None without one."""
    shared = getattr(block, "shared_expert", None)
    return None if shared is None else tuple(getattr(shared, f"{n}_proj").weight.data for n in ("gate", "up", "down"))


@torch.no_grad()
def energy_of(block: Any, seen: list[SeenToken], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Energies of a layer, token by token: ``[E, F]`` and ``[S]``."""
    experts, _, width = block.experts.down_proj.shape
    total_EF, most_EF = torch.zeros(2, experts, width, dtype=torch.float64)
    shared = shared_matrices(block)
    total_S, most_S = torch.zeros(2, 0 if shared is None else len(shared[0]), dtype=torch.float64)
    for token in seen:
        for expert, weight in zip(token.experts, token.weights, strict=True):
            gate_FD, up_FD, _ = matrices(block, expert)
            phi_F = weight * F.silu(gate_FD @ token.x_D) * (up_FD @ token.x_D)
            total_EF[expert] += phi_F**2
            most_EF[expert] = torch.maximum(most_EF[expert], phi_F**2)
        if shared is not None:
            weight = torch.sigmoid(block.shared_expert_gate.weight[0] @ token.x_D)
            phi_F = weight * F.silu(shared[0] @ token.x_D) * (shared[1] @ token.x_D)
            total_S += phi_F**2
            most_S = torch.maximum(most_S, phi_F**2)
    norm_EF = torch.stack([(matrices(block, e)[2] ** 2).sum(0) for e in range(experts)])
    energy_EF = ((1 - alpha) * total_EF + alpha * most_EF) * norm_EF
    energy_S = ((1 - alpha) * total_S + alpha * most_S) * ((shared[2] ** 2).sum(0) if shared is not None else 1)
    return energy_EF.numpy(), energy_S.numpy()


def zero_lowest(block: Any, energy_EF: np.ndarray, energy_S: np.ndarray, ratio: float) -> None:
    """Prunes the lowest channels of a layer of the model, in place, one after the other."""
    places = [(e, f) for e in range(energy_EF.shape[0]) for f in range(energy_EF.shape[1])]
    places += [(None, f) for f in range(len(energy_S))]
    energies = [*energy_EF.ravel().tolist(), *energy_S.tolist()]
    for i in sorted(range(len(places)), key=lambda i: energies[i])[: round(ratio * len(places))]:
        expert, channel = places[i]
        found = shared_matrices(block) if expert is None else matrices(block, expert)
        gate_FD, up_FD, down_DF = found
        gate_FD[channel], up_FD[channel], down_DF[:, channel] = 0, 0, 0


def naive_energies(
    path: Path, rows: CalibrationRows, alpha: float, ratio: float | None = None
) -> tuple[list[np.ndarray], list[np.ndarray], Any]:
    """Energies of every MoE layer, and the model, pruned at the ratio if there is one."""
    model, routed, shared = hf_reference(path), [], []
    for index, block in blocks_of(model).items():
        energy_EF, energy_S = energy_of(block, tokens_at(model, index, rows), alpha)
        routed.append(energy_EF)
        shared.append(energy_S)
        if ratio is not None:
            zero_lowest(block, energy_EF, energy_S, ratio)
    return routed, shared, model
