# SPDX-License-Identifier: Apache-2.0
"""Generated routing: named workloads, and one that imitates a training run. numpy only.

Experts have scores z, and a token takes the top k of z + Gumbel noise. The share of each expert can be computed without
drawing tokens: the noise turns the choice into a race in which expert e arrives at rate exp(z_e). At the time t at
which k experts have arrived on average, e has arrived with probability 1 - exp(-t exp(z_e)). The rows of a source are
drawn from those shares; they depend only on seed, workload and step, not on the layout.

``training`` is calibrated on a recorded run (GPT-MoE, 24 layers, 32 experts top-2, no balancing): z = sigma(t) u, where u
wanders (Ornstein-Uhlenbeck) so that loads ten iterations apart differ by a total variation of 0.19 before iteration 200, 0.037
up to 1,000 and 0.022 after; sigma rises from 0.2 to 6 in 30 iterations, falls to 2.0 at 500 and is 2.5 at 5,000. The
other workloads are named after those of Megatron-LM's load-balance tests.

Legend: N records, L layers, S sources, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.trace import RoutingTrace
from lightning_moefold.errors import InputError

Scores = NDArray[np.float64]
#: Score of a hot expert; other experts have 0.
_HOT = 3.0
#: For each stage, the iteration at which it ends, and the noise of u (times sigma) that gives its total variation.
_STAGES = ((200, 1.05), (1000, 0.125), (1 << 62, 0.065))


def generate(
    workload: str,
    *,
    records: int = 20,
    layers: int = 2,
    sources: int = 8,
    experts: int = 32,
    top_k: int = 2,
    tokens: int = 8192,
    every: int = 10,
    seed: int = 0,
) -> RoutingTrace:
    """Generates a trace of a workload.

    Args:
        workload: Name of the workload, a key of :data:`WORKLOADS`.
        records: Number of records, N.
        layers: Number of MoE layers, L.
        sources: Number of source ranks, S.
        experts: Number of experts, E.
        top_k: Number of experts per token.
        tokens: Number of tokens of each source and record.
        every: Number of iterations between records.
        seed: Seed of all draws.

    Raises:
        InputError: If the workload is unknown.
    """
    if workload not in WORKLOADS:
        raise InputError(f"workload {workload!r} is not known; use {', '.join(WORKLOADS)}.")
    iterations = 1 + every * np.arange(records)
    counts = np.zeros((records, layers, sources, experts), dtype=np.int64)
    key = zlib.crc32(workload.encode())
    scores_NLE = WORKLOADS[workload](np.random.default_rng([key, seed]), iterations, layers, experts)
    share = _ragged(sources) if workload == "source_ragged" else np.full(sources, 1.0)
    for n, iteration in enumerate(iterations):
        random = np.random.default_rng([key, seed, int(iteration)])
        chosen_LE = chosen_part(scores_NLE[n], top_k) / top_k
        for layer in range(layers):
            rows = np.rint(share * tokens * top_k).astype(np.int64)
            counts[n, layer] = [random.multinomial(r, chosen_LE[layer]) for r in rows]
    return RoutingTrace(iterations, counts, workload)


def chosen_part(scores_LE: Scores, top_k: int) -> Scores:
    """Returns the share of tokens that choose each expert, ``[L, E]``; rows sum to ``top_k``. -inf is never chosen."""
    rate_LE = np.exp(scores_LE - scores_LE.max(1, keepdims=True))
    low, high = np.full((len(rate_LE), 1), -60.0), np.full((len(rate_LE), 1), 60.0)
    for _ in range(80):
        middle = (low + high) / 2
        few = (-np.expm1(-np.exp(middle) * rate_LE)).sum(1, keepdims=True) < top_k
        low, high = np.where(few, middle, low), np.where(few, high, middle)
    part_LE = -np.expm1(-np.exp(low) * rate_LE)
    return part_LE * (top_k / part_LE.sum(1, keepdims=True))


def sigma_at(iteration: float) -> float:
    """Returns the spread of scores in ``training`` at an iteration."""
    return float(np.interp(iteration, (1, 30, 500, 5000), (0.2, 6.0, 2.0, 2.5)))


def _training(random: np.random.Generator, iterations: NDArray[np.int64], layers: int, experts: int) -> Scores:
    u_LE = random.standard_normal((layers, experts))
    scores, before = [], int(iterations[0])
    for iteration in iterations:
        sigma = sigma_at(iteration)
        noise = next(noise for last, noise in _STAGES if iteration <= last) / sigma
        kept = (1 - min(noise**2, 0.99)) ** ((iteration - before) / 20)
        u_LE = kept * u_LE + np.sqrt(1 - kept**2) * random.standard_normal((layers, experts))
        before = int(iteration)
        scores.append(sigma * u_LE)
    return np.stack(scores)


def _steady(hot: Callable[[Scores, np.random.Generator], None]) -> Callable[..., Scores]:
    """Makes a constant workload: mild noise, different in every layer, plus the workload's own hot experts."""

    def scores(random: np.random.Generator, iterations: NDArray[np.int64], layers: int, experts: int) -> Scores:
        scores_LE = 0.1 * random.standard_normal((layers, experts))
        hot(scores_LE, random)
        return np.repeat(scores_LE[None], len(iterations), 0)

    return scores


def _balanced(scores_LE: Scores, random: np.random.Generator) -> None:
    scores_LE[:] = 0


def _hot_experts(scores_LE: Scores, random: np.random.Generator) -> None:
    for scores_E in scores_LE:
        scores_E[random.permutation(scores_E.size)[: max(1, scores_E.size // 16)]] += _HOT


def _hot_rank(scores_LE: Scores, random: np.random.Generator) -> None:
    scores_LE[:, : max(1, scores_LE.shape[1] // 8)] += _HOT


def _spread_hot(scores_LE: Scores, random: np.random.Generator) -> None:
    scores_LE[:, :: max(1, scores_LE.shape[1] // 8)] += _HOT


def _zero_load(scores_LE: Scores, random: np.random.Generator) -> None:
    scores_LE[:, : max(1, scores_LE.shape[1] // 8)] = -np.inf
    scores_LE[:, -1] = -np.inf


def _rotating(random: np.random.Generator, iterations: NDArray[np.int64], layers: int, experts: int) -> Scores:
    scores = np.zeros((len(iterations), layers, experts))
    for n in range(len(iterations)):
        scores[n, np.arange(layers), (5 * n + np.arange(layers)) % experts] = _HOT
    return scores


def _burst(random: np.random.Generator, iterations: NDArray[np.int64], layers: int, experts: int) -> Scores:
    scores = 0.1 * np.repeat(random.standard_normal((1, layers, experts)), len(iterations), 0)
    for n in range(3, len(iterations), 8):
        scores[n, np.arange(layers), random.integers(experts, size=layers)] += 2 * _HOT
    return scores


def _ragged(sources: int) -> NDArray[np.float64]:
    """Returns weights of sources, from almost no tokens to about twice the mean."""
    return (np.arange(sources) + 0.5) * 2 / sources


WORKLOADS: dict[str, Callable[..., Scores]] = {
    "balanced": _steady(_balanced),
    "hot_experts": _steady(_hot_experts),
    "hot_rank": _steady(_hot_rank),
    "spread_hot": _steady(_spread_hot),
    "source_ragged": _steady(lambda scores_LE, random: None),
    "zero_load": _steady(_zero_load),
    "rotating_hotspot": _rotating,
    "burst": _burst,
    "training": _training,
}
