# SPDX-License-Identifier: Apache-2.0
"""Statistics of loads against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_moefold.callbacks.balance_statistics import balance_statistics, layer_statistics, rank_imbalance


def test_a_layer_by_hand() -> None:
    found = layer_statistics([6, 2, 0, 0])
    # mean 2; deviations 4, 0, -2, -2: variance 24 / 4; p = 3/4, 1/4
    assert found["max_over_mean"] == 3
    assert found["cv"] == pytest.approx(math.sqrt(6) / 2)
    assert found["dead_expert_frac"] == 0.5
    assert found["entropy"] == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 5, 5, 5], {"max_over_mean": 1, "cv": 0, "dead_expert_frac": 0, "entropy": 1}),
        ([0, 8], {"max_over_mean": 2, "cv": 1, "dead_expert_frac": 0.5, "entropy": 0}),
        ([7], {"max_over_mean": 1, "cv": 0, "dead_expert_frac": 0, "entropy": 1}),
        ([0, 0, 0], {}),
    ],
)
def test_extreme_layers(counts: list[int], expected: dict[str, float]) -> None:
    assert layer_statistics(counts) == pytest.approx(expected)


def test_a_model_by_hand() -> None:
    # cv 0, sqrt(6)/2 and (without load) nothing; utilisation 1 1 1 1 and 3 1 0 0
    found = balance_statistics(np.array([[5, 5, 5, 5], [6, 2, 0, 0], [0, 0, 0, 0]]))
    cv = math.sqrt(6) / 2
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert found == pytest.approx(
        {
            "load_imbalance": 2,
            "load_imbalance_max": 3,
            "cv_mean": cv / 2,
            "cv_median": cv / 2,
            "cv_min": 0,
            "cv_max": cv,
            "dead_expert_frac_mean": 0.25,
            "entropy_mean": (1 + entropy / math.log(4)) / 2,
            "expert_diversity_mean": (1 + math.exp(entropy) / 4) / 2,
            "expert_diversity_min": math.exp(entropy) / 4,
            "expert_utilization_min": 0,
            "expert_utilization_p25": 0.75,  # 0 0 1 1 1 1 1 3 at place 1.75
            "expert_utilization_median": 1,
            "expert_utilization_p75": 1,
            "expert_utilization_max": 3,
        }
    )


def test_layers_may_differ_in_experts() -> None:
    found = balance_statistics([[4, 0], [1, 1, 1]])
    assert found["load_imbalance"] == 1.5
    assert found["dead_expert_frac_mean"] == 0.25


def test_nothing_routed_gives_nothing() -> None:
    assert balance_statistics(np.zeros((2, 4))) == {}
    assert balance_statistics([]) == {}
    assert rank_imbalance(np.zeros((2, 4), dtype=np.int64)) is None


def test_ranks_by_hand() -> None:
    assert rank_imbalance(np.array([[3, 1], [2, 2], [0, 0]])) == 1.25
