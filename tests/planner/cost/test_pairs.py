# SPDX-License-Identifier: Apache-2.0
"""Expected pairs of a token and a place, against every set of experts, and against tokens drawn and counted one by one."""

from itertools import combinations, product

import numpy as np
import pytest

from lightning_moefold.planner.cost.pairs import chosen_part, fit_weights, odds_under, pairs_of, used_places
from lightning_moefold.planner.cost.routing import PROFILES, RoutingProfile
from tests.quick import quick


def every_set(weight, served, top_k, places):
    """Part of the tokens with a served choice at each place, summed over all sets of experts and all drops of choices."""
    experts, used, total = len(weight), np.zeros(places), 0.0
    for chosen in combinations(range(experts), top_k):
        likely = np.prod([weight[e] for e in chosen])
        total += likely
        for kept in product((True, False), repeat=top_k):
            part = likely
            for expert, stays in zip(chosen, kept, strict=True):
                part *= served[expert] if stays else 1 - served[expert]
            for place in {e // (experts // places) for e, stays in zip(chosen, kept, strict=True) if stays}:
                used[place] += part
    return used / total


@pytest.mark.parametrize(("experts", "places"), [(6, 1), (6, 2), (6, 3), (6, 6), (8, 4)])
@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
def test_every_set_is_counted(experts, places, top_k):
    random = np.random.default_rng(experts * places + top_k)
    weight, served = random.lognormal(size=(2, experts)), random.uniform(size=(2, experts))
    served[1] = 1.0
    found = used_places(weight, served, top_k, places)
    for layer in range(2):
        assert found[layer] == pytest.approx(every_set(weight[layer], served[layer], top_k, places), abs=1e-12)
        if top_k < experts:
            alone = every_set(weight[layer], np.ones(experts), top_k, experts)
            assert odds_under(weight[layer : layer + 1], top_k)[0] == pytest.approx(alone / (1 - alone), rel=1e-12)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (128, 8), (4, 4)])
def test_weights_meet_the_frequencies(name, experts, top_k):
    shares = PROFILES[name].expert_shares(experts, top_k)
    chosen = chosen_part(shares, top_k)
    assert chosen == pytest.approx(top_k * shares, abs=1e-4)
    if top_k < experts:
        assert odds_under(fit_weights(chosen, top_k), top_k) == pytest.approx(chosen / (1 - chosen), rel=1e-6)


def drawn(sigma, experts, top_k, layers=24, tokens=1024):
    """The tokens from which a profile takes its frequencies, ``[layers][tokens]`` sets of experts."""
    random, out = np.random.default_rng(0), []
    for _ in range(layers):
        scores = random.normal(0.0, sigma, experts) + random.gumbel(size=(tokens, experts))
        out.append([sorted(range(experts), key=row.__getitem__)[-top_k:] for row in scores.tolist()])
    return out


def counted(tokens, experts, places, limit=None):
    """Distinct pairs in drawn tokens: of a token, and as if all places had those of the busiest.

    With a limit, an expert serves any of its choices, so many times the mean.
    """
    random, mean, busiest = np.random.default_rng(1), 0.0, 0.0
    for layer in tokens:
        kept, pairs = [list(chosen) for chosen in layer], [0] * places
        for expert in range(experts) if limit is not None else ():
            choices = [t for t, chosen in enumerate(layer) if expert in chosen]
            for t in random.permutation(choices)[int(limit * sum(map(len, layer)) / experts) :].tolist():
                kept[t].remove(expert)
        for chosen in kept:
            for place in {e // (experts // places) for e in chosen}:
                pairs[place] += 1
        mean += sum(pairs) / len(layer) / len(tokens)
        busiest += places * max(pairs) / len(layer) / len(tokens)
    return mean, busiest


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8)])
@pytest.mark.parametrize("sigma", quick([0.4, 1.5], 1.5))
@pytest.mark.parametrize("limit", [None, 1.0])
def test_drawn_tokens_are_counted(experts, top_k, sigma, limit):
    tokens, profile = drawn(sigma, experts, top_k), RoutingProfile("drawn", sigma)
    for places in (2, 4, 8):
        mean, busiest = counted(tokens, experts, places, limit)
        found = pairs_of(profile, experts, top_k, places, limit)
        assert found.mean == pytest.approx(mean, rel=0.01)
        assert found.busiest == pytest.approx(busiest, rel=0.02)
    # An expert alone on its rank: pairs are rows.
    rows = top_k * profile.load_factor(experts, top_k, experts, limit)
    assert pairs_of(profile, experts, top_k, experts, limit).busiest == pytest.approx(rows, rel=1e-5)


def test_drawn_tokens_of_a_trace_and_of_balanced_routing():
    experts, top_k = 16, 4
    tokens = drawn(0.8, experts, top_k, layers=3, tokens=4000)
    counts = [[sum(e in chosen for chosen in layer) for e in range(experts)] for layer in tokens]
    trace = RoutingProfile("trace", shares=tuple(tuple(n / (top_k * 4000) for n in row) for row in counts))
    even = drawn(0.0, experts, top_k, layers=1, tokens=20000)
    for places in (2, 4, 8):
        mean, busiest = counted(tokens, experts, places)
        found = pairs_of(trace, experts, top_k, places)
        assert (found.mean, found.busiest) == pytest.approx((mean, busiest), rel=0.015)
        mean, _ = counted(even, experts, places)
        alike = pairs_of(PROFILES["balanced"], experts, top_k, places)
        assert alike.mean == alike.busiest == pytest.approx(mean, rel=0.01)
        mean, _ = counted(even, experts, places, limit=0.5)
        assert pairs_of(PROFILES["balanced"], experts, top_k, places, 0.5).mean == pytest.approx(mean, rel=0.02)


def test_bounds():
    """No token goes anywhere twice, or to more places than it has experts; nodes hold ranks."""
    for profile in (
        *PROFILES.values(),
        RoutingProfile("one expert", shares=((1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),)),
    ):
        before = 1.0
        for places in (1, 2, 4, 8):
            pairs = pairs_of(profile, 8, 3, places)
            assert before - 1e-9 <= pairs.mean <= pairs.busiest + 1e-9
            assert pairs.mean <= min(3, places) + 1e-9
            assert pairs.busiest <= places + 1e-9
            before = pairs.mean
