# SPDX-License-Identifier: Apache-2.0
"""Homes, against every placement of small instances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold.balance.fill import Layout
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.predict import of_a_pass, predicted, window
from lightning_moefold.balance.relocate import least_score, relocated, settled
from tests.balance.test_fill import COSTS, skewed


def all_parts(experts: int, parts: int) -> Iterator[np.ndarray]:
    """Every way to put as many experts on each rank."""

    def place(left: tuple[int, ...], part: int, part_E: list[int]) -> Iterator[np.ndarray]:
        if not left:
            yield np.array(part_E)
            return
        for chosen in combinations(left, experts // parts):
            new = list(part_E)
            for e in chosen:
                new[e] = part
            yield from place(tuple(e for e in left if e not in chosen), part + 1, new)

    yield from place(tuple(range(experts)), 0, [0] * experts)


def score(rows_E: np.ndarray, part_E: np.ndarray, parts: int, costs, slots: int) -> int:
    layout = Layout(rows_E.tolist(), part_E.tolist(), parts, costs, slots)
    return layout.score(layout.best_copies())


def test_near_the_best_of_all_placements(record_property) -> None:
    """Gap of the time after copies, with moves for nothing; and no placement is below the bound."""
    gaps, home = [], Placement.contiguous(6, 3)
    for seed in range(12):
        rows_E = skewed(seed, 6, 1200, (0.7, 1.3, 1.8)[seed % 3])
        costs = replace(COSTS, margin_ppm=0, near_copy_ps=(20_000, 80_000)[seed % 2])
        placement = relocated(rows_E[None], home, costs, 1)
        scores = [score(rows_E, part_E, 3, costs, 1) for part_E in all_parts(6, 3)]
        ours = score(rows_E, np.asarray(placement.part_of_expert), 3, costs, 1)
        assert len(scores) == 90
        assert least_score(rows_E, 3, costs) <= min(scores) <= ours
        assert ours <= score(rows_E, np.asarray(home.part_of_expert), 3, costs, 1)
        gaps.append(ours / min(scores) - 1)
    record_property("gap_mean", float(np.mean(gaps)))
    print("gaps to the best placement:", np.round(gaps, 4))
    assert np.mean(gaps) < 0.03
    assert max(gaps) < 0.15


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 3000))
def test_settled_is_a_placement(parts: int, local: int, seed: int, level: int) -> None:
    experts = parts * local
    here_E = np.random.default_rng(seed).permutation(np.repeat(np.arange(parts), local))
    part_E = settled(skewed(seed, experts), here_E, replace(COSTS, parts_per_node=2), parts, level)
    assert np.bincount(part_E, minlength=parts).tolist() == [local] * parts


def test_experts_that_fit_stay() -> None:
    here_E = np.array([2, 0, 1, 0, 1, 2])
    assert settled(np.array([30, 30, 30, 30, 30, 30]), here_E, COSTS, 3, 60).tolist() == here_E.tolist()


def test_windows_follow_the_drift() -> None:
    """Where loads jump only the latest interval counts; where they are noisy, the mean of several."""
    random = np.random.default_rng(0)
    noisy = np.stack([random.multinomial(400, np.full(8, 1 / 8)) for _ in range(6)])
    assert window(noisy) > 1
    jumping = np.vstack([noisy[:4], np.tile([400, 0, 0, 0, 0, 0, 0, 0], (2, 1))])
    assert window(jumping) == 1
    assert predicted(jumping).tolist() == jumping[-1].tolist()
    assert window(noisy[:1]) == 1
    assert predicted(np.zeros((3, 4), dtype=np.int64)).tolist() == [0] * 4


def test_scaling_to_a_pass() -> None:
    load_NE = np.array([[100, 300], [0, 0], [7, 1]])
    assert of_a_pass(load_NE, COSTS) is load_NE
    assert of_a_pass(load_NE, replace(COSTS, pass_rows=40)).tolist() == [[10, 30], [0, 0], [35, 5]]


@pytest.mark.parametrize("rows", [0, 7])
def test_even_loads_move_nothing(rows: int) -> None:
    home = Placement.contiguous(8, 4)
    for margin in (0, 10_000):
        assert relocated(np.full((5, 8), rows), home, replace(COSTS, margin_ppm=margin), 2) is home
