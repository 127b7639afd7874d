# SPDX-License-Identifier: Apache-2.0
"""Expected number of pairs of a token and a place (a rank, a node) that holds some of the token's experts.

This is what travels if each token goes to each place once. A routing profile says how often each expert is chosen, not
which experts are chosen together. So the model assumes the distribution of largest entropy with these frequencies
("conditional Poisson sampling"): a set of k experts has a probability proportional to the product of their weights.
Under balanced routing all weights are equal and so are all sets, which is exact. The probability that a place is not
chosen is a ratio of polynomial coefficients::

    P(no choice in S) = [x^k] prod_{e not in S} (1 + w_e x) / [x^k] prod_e (1 + w_e x)

If an expert's capacity drops a share ``1 - q_e`` of its choices, at random, then a dropped choice does not count, and
the factor of e in S is ``1 + (1 - q_e) w_e x``.

Legend: Y layers of the profile, E experts, S places with L experts each, K experts per token.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np

from lightning_moefold.planner.cost.routing import RoutingProfile, Shares

#: Relative tolerance of the fitted odds, and the maximum number of iterations.
_CLOSE, _ROUNDS = 1e-8, 100
#: Smallest share of tokens that choose an expert; the largest share is 1 minus this.
_LEAST = 1e-6


class Pairs(NamedTuple):
    """Number of pairs of a token and a place, per token.

    Args:
        mean: Average number of places of a token.
        busiest: The number if every place had as many pairs as the busiest place; mean over layers.
    """

    mean: float
    busiest: float


@lru_cache(maxsize=4096)
def pairs_of(
    profile: RoutingProfile, num_experts: int, top_k: int, places: int, capacity_factor: float | None = None
) -> Pairs:
    """Computes the expected pairs of a token; each place holds a block of consecutive experts.

    Args:
        profile: Routing profile.
        num_experts: Number of experts, E.
        top_k: Number of experts per token, K.
        places: S, a divisor of E.
        capacity_factor: An expert serves at most this many times the mean, as in :meth:`.RoutingProfile.load_factor`.
    """
    limit = np.inf if capacity_factor is None else capacity_factor
    if not profile.shares and profile.sigma == 0:
        mean = places * _used_alike(num_experts, top_k, num_experts // places, min(limit, 1.0))
        return Pairs(mean, mean)
    chosen_YE, weight_YE = _weights(profile, num_experts, top_k)
    relative_YE = chosen_YE * num_experts / top_k
    served_YE = np.minimum(1.0, limit / np.maximum(relative_YE, 1e-12))
    used_YS = used_places(weight_YE, served_YE, top_k, places)
    return Pairs(float(used_YS.sum(1).mean()), float(places * used_YS.max(1).mean()))


def _used_alike(num_experts: int, top_k: int, local: int, served: float) -> float:
    """Returns the share of tokens with a served choice among ``local`` experts, if all experts are chosen equally often."""
    sets = comb(num_experts, top_k)
    there = range(min(local, top_k) + 1)
    missed = (comb(local, j) * comb(num_experts - local, top_k - j) * (1 - served) ** j for j in there)
    return 1 - sum(missed) / sets


@lru_cache(maxsize=64)
def _weights(profile: RoutingProfile, num_experts: int, top_k: int) -> tuple[Shares, Shares]:
    chosen_YE = chosen_part(profile.expert_shares(num_experts, top_k), top_k)
    return chosen_YE, fit_weights(chosen_YE, top_k)


def chosen_part(shares_YE: Shares, top_k: int) -> Shares:
    """Returns the share of tokens that choose each expert; if a trace gives more than 1, the excess goes to other experts."""
    most = 1 - _LEAST
    if top_k >= shares_YE.shape[1]:
        return np.full_like(shares_YE, most)
    chosen_YE = np.maximum(shares_YE, _LEAST / shares_YE.shape[1])
    chosen_YE = chosen_YE * (top_k / chosen_YE.sum(1, keepdims=True))
    for _ in range(top_k):
        full_YE = chosen_YE >= most
        left_Y = top_k - most * full_YE.sum(1, keepdims=True)
        rest_Y = np.where(full_YE, 0.0, chosen_YE).sum(1, keepdims=True)
        chosen_YE = np.where(full_YE, most, chosen_YE * (left_Y / rest_Y))
    return np.minimum(chosen_YE, most)


def fit_weights(chosen_YE: Shares, top_k: int) -> Shares:
    """Computes weights with which a share ``chosen_YE`` of the tokens chooses each expert.

    Each weight is corrected until its expert's odds are right (Chen, Dempster and Liu, Biometrika 1994, do this with
    probabilities).
    """
    if top_k >= chosen_YE.shape[1]:
        return np.ones_like(chosen_YE)
    odds_YE = chosen_YE / (1 - chosen_YE)
    weight_YE = odds_YE
    for _ in range(_ROUNDS):
        correction_YE = odds_YE / odds_under(weight_YE, top_k)
        weight_YE = weight_YE * correction_YE
        weight_YE /= weight_YE.max(1, keepdims=True)
        if np.abs(correction_YE - 1).max() < _CLOSE:
            break
    return weight_YE


def odds_under(weight_YE: Shares, top_k: int) -> Shares:
    """Returns the odds of each expert: the weight of sets with it and K - 1 others, over that of sets of K others; K < E.

    Only positive numbers are added, so the odds are exact even for an expert that nearly every token chooses.
    """
    layers, experts = weight_YE.shape
    before_YEK = np.zeros((layers, experts, top_k + 1))
    after_YEK = np.zeros_like(before_YEK)
    before_YEK[:, 0, 0] = after_YEK[:, -1, 0] = 1.0
    for e in range(1, experts):
        for many, last, now in ((before_YEK, e - 1, e), (after_YEK, experts - e, experts - e - 1)):
            many[:, now] = many[:, last]
            many[:, now, 1:] += weight_YE[:, last, None] * many[:, last, :-1]
    without_YE = (before_YEK * after_YEK[..., ::-1]).sum(-1)
    fewer_YE = (before_YEK[..., :-1] * after_YEK[..., top_k - 1 :: -1]).sum(-1)
    return weight_YE * fewer_YE / without_YE


def used_places(weight_YE: Shares, served_YE: Shares, top_k: int, places: int) -> Shares:
    """Returns the share of tokens with a served choice at each place, ``[Y, S]``, by the formula above."""
    layers = len(weight_YE)
    whole_YSK = _products(weight_YE.reshape(layers, places, -1), top_k)
    dropped_YSK = _products((weight_YE * (1 - served_YE)).reshape(layers, places, -1), top_k)
    before = [np.eye(1, top_k + 1).repeat(layers, 0)]
    after = [before[0]]
    for s in range(places - 1):
        before.append(_times(before[-1], whole_YSK[:, s], top_k))
        after.append(_times(whole_YSK[:, places - 1 - s], after[-1], top_k))
    others_YSK = _times(np.stack(before, 1), np.stack(after[::-1], 1), top_k)
    missed_YS = _times(others_YSK, dropped_YSK, top_k)[..., top_k]
    return 1 - missed_YS / _times(others_YSK, whole_YSK, top_k)[..., top_k]


def _products(weight_YSL: Shares, top_k: int) -> Shares:
    """Computes the coefficients of ``prod_l (1 + w_l x)`` up to x^K, ``[Y, S, K + 1]``."""
    found = np.zeros((*weight_YSL.shape[:2], top_k + 1))
    found[..., 0] = 1.0
    for expert in range(weight_YSL.shape[2]):
        found[..., 1:] += weight_YSL[..., expert, None] * found[..., :-1]
    return found


def _times(a: Shares, b: Shares, top_k: int) -> Shares:
    """Multiplies polynomials up to x^K; coefficients are in the last dimension."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape))
    for j in range(top_k + 1):
        out[..., j:] += a[..., j : j + 1] * b[..., : top_k + 1 - j]
    return out
