# SPDX-License-Identifier: Apache-2.0
"""Routing profiles: how unevenly tokens choose experts, and the load of the busiest rank. numpy only.

A layer's expert popularity is log-normal: every layer draws scores ``z_e ~ N(0, sigma^2)``, and each token takes the
top k of ``z + Gumbel noise``. The single number sigma covers what is seen in training: about 0.4 for a fine-tuned
Mixtral without an auxiliary loss (busiest of 8 ranks at 1.6 times the mean), 1.5 for training without balancing, and
2.5 if the router collapses. A MoE layer is as slow as its busiest rank, since the exchange waits for it; so a layer
costs the *mean
over layers of the maximum over ranks*.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_moefold.errors import DAMAGE, InputError

Shares = npt.NDArray[np.float64]
_LAYERS, _TOKENS, _SEED = 24, 1024, 0


@dataclass(frozen=True)
class RoutingProfile:
    """Expert popularity of a run.

    Args:
        name: ``balanced``, ``mild``, ``skewed``, or the name of a trace.
        sigma: Spread of the log-popularity; 0 is perfect balance.
        shares: Recorded popularity ``[layers][experts]``, each row summing to 1; replaces ``sigma``.
    """

    name: str
    sigma: float = 0.0
    shares: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def expert_shares(self, num_experts: int, top_k: int) -> Shares:
        """Returns the share of all choices that each expert gets, ``[layers, experts]``."""
        if self.shares:
            return _resampled(self.shares, num_experts)
        return _sampled(self.sigma, num_experts, top_k)

    @lru_cache(maxsize=1024)
    def load_factor(self, num_experts: int, top_k: int, ep: int, capacity_factor: float | None = None) -> float:
        """Returns the rows on the busiest of ``ep`` ranks divided by the balanced number, averaged over layers.

        Each rank holds a block of consecutive experts. With a capacity, an expert serves at most ``capacity_factor``
        times the mean.
        """
        relative = self.expert_shares(num_experts, top_k) * num_experts
        if capacity_factor is not None:
            relative = np.minimum(relative, capacity_factor)
        ranks = relative.reshape(len(relative), ep, -1).mean(2)
        return float(ranks.max(1).mean())

    @classmethod
    def from_trace(cls, path: str | Path) -> RoutingProfile:
        """Reads recorded counts: ``.npz`` (array ``counts``), ``.npy`` or ``.json``; the last axis counts experts.

        Axes are ``[layers, experts]``, ``[steps, layers, experts]`` or ``[steps, layers, ranks, experts]``; the last
        quarter of the steps is used, since routing early in training says little about later routing.

        Raises:
            ValueError: If the file does not hold such an array.
        """
        file = Path(path)
        if not file.is_file():
            raise InputError(f"routing {str(path)!r} is neither a profile ({', '.join(PROFILES)}) nor a file.")
        try:
            counts = _read_counts(file)
        except InputError:
            raise
        except DAMAGE as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file} holds no counts of routing ({type(error).__name__}: {reason}).") from None
        if counts.ndim == 4:
            counts = counts.sum(2)
        if counts.ndim == 3:
            counts = counts[-max(len(counts) // 4, 1) :].sum(0)
        if counts.ndim != 2 or counts.shape[1] < 1 or not np.isfinite(counts).all() or (counts < 0).any():
            raise InputError(
                f"{file}: expected counts of [layers, experts] with optional steps and ranks, got shape {counts.shape}."
            )
        counts = counts[counts.sum(1) > 0]
        if not len(counts):
            raise InputError(f"{file}: all counts are zero.")
        shares = counts / counts.sum(1, keepdims=True)
        return cls(file.stem, shares=tuple(tuple(float(x) for x in row) for row in shares))


def _read_counts(file: Path) -> Shares:
    raw = json.loads(file.read_text()) if file.suffix == ".json" else np.load(file, allow_pickle=False)
    if isinstance(raw, np.lib.npyio.NpzFile) and "counts" not in raw.files:
        raise InputError(f"{file} has no array 'counts'; it has {', '.join(raw.files)}.")
    return np.asarray(raw["counts"] if isinstance(raw, (dict, np.lib.npyio.NpzFile)) else raw, dtype=np.float64)


@lru_cache(maxsize=64)
def _sampled(sigma: float, num_experts: int, top_k: int) -> Shares:
    if sigma == 0:
        return np.full((1, num_experts), 1.0 / num_experts)
    random = np.random.default_rng(_SEED)
    shares = np.empty((_LAYERS, num_experts))
    for layer in range(_LAYERS):
        scores = random.normal(0.0, sigma, num_experts) + random.gumbel(size=(_TOKENS, num_experts))
        chosen = np.argpartition(scores, num_experts - top_k, axis=1)[:, num_experts - top_k :]
        shares[layer] = np.bincount(chosen.ravel(), minlength=num_experts) / chosen.size
    return shares


@lru_cache(maxsize=64)
def _resampled(shares: tuple[tuple[float, ...], ...], num_experts: int) -> Shares:
    """Returns the recorded popularity, resampled by quantile if the trace has a different number of experts."""
    recorded = np.asarray(shares)
    if recorded.shape[1] == num_experts:
        return recorded
    # Cut the popularity curve of the trace into as many equal pieces as there are experts; the order is shuffled
    # because sorted experts in blocks would put all popular ones on one rank.
    curve = np.concatenate([np.zeros((len(recorded), 1)), np.cumsum(np.sort(recorded, 1), 1)], 1)
    grid = np.linspace(0, recorded.shape[1], num_experts + 1)
    cut = np.stack([np.interp(grid, np.arange(recorded.shape[1] + 1), row) for row in curve])
    pieces = np.diff(cut, axis=1)
    random = np.random.default_rng(_SEED)
    return np.stack([row[random.permutation(num_experts)] for row in pieces])


BALANCED = RoutingProfile("balanced")
PROFILES: dict[str, RoutingProfile] = {
    "balanced": BALANCED,
    "mild": RoutingProfile("mild", 0.4),
    "skewed": RoutingProfile("skewed", 1.5),
}


def find_routing(name: str) -> RoutingProfile:
    """Returns a profile by name, or reads a recorded trace by path.

    Raises:
        ValueError: If the name is neither a profile nor a file.
    """
    return PROFILES.get(name.lower()) or RoutingProfile.from_trace(name)
