# SPDX-License-Identifier: Apache-2.0
"""What the slow loop decides, from counts alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.slow import FIRST, LAST, SlowLoop
from lightning_moefold.errors import InputError


def costs(row_ps: int, move_ps: int, passes: int = 1) -> BalanceCosts:
    return BalanceCosts(row_ps, 0, 1, 1, 0, move_ps, move_ps, 1, 1, 2, passes)


CHEAP = costs(1_000_000, 1000)
#: Two busy experts on the first of two ranks.
SKEWED = np.array([50, 50, 0, 0])


def decide(
    loop: SlowLoop, load_E: Any, placement: Placement, constants: BalanceCosts = CHEAP, step: int = 8, left: int = 100
) -> Any:
    return loop.decide(step, {"layer": np.asarray(load_E)}, {"layer": placement}, constants, left)


def greedy(**arguments: Any) -> SlowLoop:
    return SlowLoop("smartmoe_greedy", **arguments)


def test_moves_where_it_pays() -> None:
    decision = decide(greedy(), SKEWED, Placement.contiguous(4, 2))
    assert decision.placements["layer"].part_load(SKEWED).tolist() == [50, 50]
    assert (decision.kind, decision.before, decision.after, decision.moved) == ("moved", 2.0, 1.0, 2)
    assert decision.gain_ps == 50 * CHEAP.row_ps
    assert decision.cost_ps == CHEAP.near_move_ps  # each rank sends one expert
    twice = decide(greedy(), SKEWED, Placement.contiguous(4, 2), costs(1_000_000, 1000, passes=2))
    assert twice.gain_ps == 2 * decision.gain_ps


def test_another_run_begins_anew() -> None:
    loop = greedy()
    decide(loop, SKEWED, Placement.contiguous(4, 2))
    loop.forget()
    assert loop.past("layer").size == 0
    assert decide(loop, np.array([50, 50, 0, 0, 0, 0]), Placement.contiguous(6, 2)).kind == "moved"


def test_joint_waits_for_some_intervals_and_weighs_by_itself() -> None:
    loop, here = SlowLoop(), Placement.contiguous(4, 2)
    kinds = [decide(loop, SKEWED, here, step=8 * n).kind for n in range(5)]
    assert kinds[0] == "even"
    assert "moved" in kinds
    assert decide(SlowLoop(margin=0.0), SKEWED, here).kind == "moved"


@pytest.mark.parametrize(
    ("load_E", "constants", "left", "kind", "words"),
    [
        ([0, 0, 0, 0], CHEAP, 100, "idle", "nothing was counted"),
        ([25, 25, 25, 25], CHEAP, 100, "even", "has 1 times the mean, and the policy knows nothing that is better"),
        (SKEWED, costs(1, 1_000_000), 100, "dear", "moving 2 experts would gain"),
        (SKEWED, CHEAP, 0, "dear", "in 0 steps and take"),
    ],
)
def test_leaves_alone_and_says_why(load_E: Any, constants: BalanceCosts, left: int, kind: str, words: str) -> None:
    decision = decide(greedy(), load_E, Placement.contiguous(4, 2), constants, left=left)
    assert not decision.placements
    assert decision.kind == kind
    assert words in decision.reason


def test_without_margin_anything_better_is_taken() -> None:
    loop = greedy(interval=1, margin=0.0)
    assert decide(loop, SKEWED, Placement.contiguous(4, 2), costs(1, 10**12), left=0).kind == "moved"
    assert loop.next_check == 9


def test_a_gain_must_hold_in_the_latest_interval() -> None:
    loop, here = greedy(margin=0.0), Placement.contiguous(4, 2)
    decide(loop, [900, 900, 0, 0], here, costs(1, 1))
    assert decide(loop, [0, 10, 10, 0], here, costs(1, 1), step=16).kind == "even"


def test_the_adaptive_interval_grows_while_nothing_moves() -> None:
    loop, here = greedy(), Placement.contiguous(4, 2)
    loop.start(0)
    checks, step = [], 0
    for _ in range(8):
        step = loop.next_check
        checks.append(step)
        decide(loop, [1, 1, 1, 1], here, step=step)
    assert checks == [8, 24, 56, 120, 248, 504, 760, 1016]
    assert np.diff(checks).max() == LAST
    decide(loop, np.array([0, 0, 5000, 5000]), here, step=loop.next_check)
    assert loop.next_check - checks[-1] == LAST + LAST // 2
    assert FIRST == 8


def test_goes_on_after_a_checkpoint() -> None:
    loop, other = greedy(), greedy()
    loop.start(0)
    for step in (8, 24):
        decide(loop, SKEWED, Placement.contiguous(4, 2), costs(1, 10**9), step=step)
    other.load_state_dict(loop.state_dict())
    other.start(30)
    assert (other.next_check, other.state_dict()) == (56, loop.state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "smartmoe"}, "policy 'smartmoe' is not known .did you mean smartmoe_greedy"),
        ({"interval": 0}, "interval=0 must be"),
        ({"interval": "often"}, "interval='often' must be"),
        ({"margin": -1.0}, "margin=-1.0 must be a part of a layer's time"),
        ({"margin": float("nan")}, "margin=nan must be a part of a layer's time"),
        ({"history": 0}, "history=0 must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SlowLoop(**arguments)


def test_a_policy_that_answers_for_another_layer_is_refused() -> None:
    with pytest.raises(InputError, match="4 parts cannot follow one of 4 experts on 2"):
        decide(SlowLoop(lambda *_: Placement.contiguous(4, 4)), SKEWED, Placement.contiguous(4, 2))
