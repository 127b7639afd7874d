# SPDX-License-Identifier: Apache-2.0
"""Whether experts should move for good, and when to ask again. Pure NumPy; the same on every rank.

A policy proposes a placement for each layer from past counts. It is taken where the busiest part would have fewer rows, over
the past intervals and in the latest one alone, by more than a margin, and where the time that this gains over the rest of the
run is more than moving takes. ``joint`` weighs all this itself, together with what copies will mend. All of it is integer
arithmetic on counts and on constants that every rank has: a rank that decided by what it measured itself would leave its peers
waiting.

Legend: N past intervals, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.costs import MARGIN, BalanceCosts
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies import make_policy
from lightning_moefold.balance.policies.joint import Joint
from lightning_moefold.balance.worth import best_that_pays, worth_of
from lightning_moefold.errors import InputError

#: ``(load_NE, current, costs) -> placement``: rows of a pass in past intervals, where experts are, and constants that all ranks
#: share. A function of its arguments alone, since every rank asks it for itself and must hear the same.
Place = Callable[[NDArray[np.int64], Placement, BalanceCosts], Placement]

#: Steps until the first adaptive check, and the most between two.
FIRST, LAST = 8, 256
#: Steps for which a gain is believed to last at most: loads drift.
HORIZON = 1000


@dataclass(frozen=True)
class Decision:
    """What to do after a check.

    Args:
        placements: New ones, by layer; none where everything stays.
        before: Mean over layers of the busiest part's rows over the mean, in the latest interval.
        after: What it would have been there with what is decided.
        moved: Experts that change their part.
        gain_ps: Predicted, each step, of the moves that are made.
        cost_ps: Of these moves.
        reason: Why everything stays, in words; empty where something moves.
        kind: Of that reason: ``"moved"``, ``"idle"``, ``"even"`` (nothing better is known) or ``"dear"``.
    """

    placements: dict[str, Placement] = field(default_factory=dict)
    before: float = 1.0
    after: float = 1.0
    moved: int = 0
    gain_ps: int = 0
    cost_ps: int = 0
    reason: str = ""
    kind: Literal["moved", "idle", "even", "dear"] = "idle"


class SlowLoop:
    """Decides when to look, and what to move.

    Args:
        policy: A name in :data:`~.policies.POLICIES`, or a function.
        interval: Optimizer steps between checks; ``"auto"`` looks soon after a move and ever more rarely while nothing moves.
        margin: Part of a layer's time that a move must gain, besides the time that it takes; 0 moves whenever the prediction is
            better, whatever that takes.
        history: Past intervals that a policy sees.

    Attributes:
        next_check: Step of the next check.
        margin_ppm: The margin in millionths.

    Raises:
        InputError: For a policy that is not known or numbers out of range.
    """

    def __init__(
        self,
        policy: str | Place = "joint",
        interval: int | Literal["auto"] = "auto",
        margin: float = MARGIN,
        history: int = 8,
    ) -> None:
        if interval != "auto" and (not isinstance(interval, int) or interval < 1):
            raise InputError(f"interval={interval!r} must be 'auto' or a number of optimizer steps of at least 1.")
        if not 0 <= margin < 1:
            raise InputError(f"margin={margin} must be a part of a layer's time, from 0 to less than 1.")
        if history < 1:
            raise InputError(f"history={history} must be at least 1 interval.")
        self._policy = policy
        self._pool: Mapping[str, Sequence[Placement]] = {}
        self.expect_copies(0)
        self.interval, self.margin_ppm = interval, round(margin * 1_000_000)
        self._between = FIRST if interval == "auto" else interval
        self.next_check = 0
        self._past: deque[dict[str, NDArray[np.int64]]] = deque(maxlen=history)

    def forget(self) -> None:
        """Forgets what was counted: another run begins."""
        self._between = FIRST if self.interval == "auto" else self.interval
        self.next_check = 0
        self._past.clear()

    def expect_copies(self, most: int) -> None:
        """Has ``joint`` reckon with what copies for one pass will mend.

        Args:
            most: That a rank may have of a layer; 0 where there are none.
        """
        self._made = make_policy(self._policy, most) if isinstance(self._policy, str) else None
        self._weighs_itself = isinstance(self._made, Joint)

    def offer(self, pool: Mapping[str, Sequence[Placement]]) -> None:
        """Has placements weighed that are known before the run.

        Args:
            pool: By layer.
        """
        self._pool = pool

    def past(self, layer: str) -> NDArray[np.int64]:
        """Rows of each expert in a pass in the past intervals, ``[N, E]``; N may be 0."""
        seen = [past[layer] for past in self._past if layer in past]
        return np.stack(seen) if seen else np.zeros((0, 0), dtype=np.int64)

    def start(self, step: int) -> None:
        """Begins to count at ``step``, unless a checkpoint has said where to go on."""
        if not step < self.next_check <= step + self._between:
            self.next_check = step + self._between

    def is_due(self, step: int) -> bool:
        """Whether to look after ``step``."""
        return step >= self.next_check

    def decide(
        self,
        step: int,
        rows: Mapping[str, NDArray[np.int64]],
        current: Mapping[str, Placement],
        costs: BalanceCosts,
        left: int,
    ) -> Decision:
        """Looks at what was counted since the last check.

        Args:
            step: This one.
            rows: Of each expert in a pass, by layer.
            current: Placements, by layer.
            costs: Constants.
            left: Steps of the run that are left, for which a move may pay.

        Returns:
            What to move; the next check is set.
        """
        self._past.append({name: np.asarray(rows_E, dtype=np.int64) for name, rows_E in rows.items()})
        costs = replace(costs, horizon=max(0, min(left, HORIZON)), margin_ppm=self.margin_ppm)
        asked = [self._ask(name, placement, costs) for name, placement in current.items()]
        decision = _together([one for one in asked if one is not None], costs)
        if self.interval == "auto":
            longer = min(2 * self._between, LAST)
            self._between = max(FIRST, self._between // 2) if decision.placements else longer
        self.next_check = step + self._between
        return decision

    def _ask(self, name: str, current: Placement, costs: BalanceCosts) -> _Proposal | None:
        load_NE = self.past(name)
        if not load_NE.sum():
            return None
        placement = self._place(load_NE, current, costs, self._pool.get(name, ()))
        uneven = _imbalance(load_NE[-1], current)
        if placement == current:
            return _Proposal(name, current, uneven, uneven)
        worth = worth_of(placement, load_NE, current, costs)
        return _Proposal(
            name, placement, uneven, _imbalance(load_NE[-1], placement), placement.moved(current), worth.gain_ps,
            worth.cost_ps, self._weighs_itself or worth.better, self._weighs_itself or worth.pays,
        )  # fmt: skip

    def _place(
        self, load_NE: NDArray[np.int64], current: Placement, costs: BalanceCosts, offered: Sequence[Placement]
    ) -> Placement:
        if self._made is not None:
            return self._made.choose(load_NE, current, costs, offered)
        assert callable(self._policy)
        return best_that_pays(self._policy(load_NE, current, costs), offered, load_NE, current, costs)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        past = [{name: load_E.tolist() for name, load_E in counts.items()} for counts in self._past]
        return {"between": self._between, "next_check": self.next_check, "past": past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken."""
        if self.interval == "auto":
            self._between = state["between"]
        self.next_check = state["next_check"]
        self._past.clear()
        for counts in state["past"]:
            self._past.append({name: np.array(load, dtype=np.int64) for name, load in counts.items()})


@dataclass(frozen=True)
class _Proposal:
    """A layer's new placement, or its old one."""

    layer: str
    placement: Placement
    before: float
    after: float
    moved: int = 0
    gain_ps: int = 0
    cost_ps: int = 0
    better: bool = False
    worth: bool = False


def _together(asked: list[_Proposal], costs: BalanceCosts) -> Decision:
    if not asked:
        return Decision(reason="nothing was counted")
    before = float(np.mean([one.before for one in asked]))
    taken = [one for one in asked if one.worth]
    if taken:
        return Decision(
            {one.layer: one.placement for one in taken}, before,
            float(np.mean([one.after if one.worth else one.before for one in asked])),
            sum(one.moved for one in taken), sum(one.gain_ps for one in taken), sum(one.cost_ps for one in taken),
            kind="moved",
        )  # fmt: skip
    busiest = f"the busiest rank has {before:.3g} times the mean"
    better = [one for one in asked if one.better]
    if not better:
        reason = f"{busiest}, and the policy knows nothing that is better and worth its moves"
        return Decision(before=before, after=before, reason=reason, kind="even")
    gain, cost = sum(one.gain_ps for one in better), sum(one.cost_ps for one in better)
    return Decision(
        before=before, after=before, gain_ps=gain, cost_ps=cost, kind="dear",
        reason=f"{busiest}; moving {sum(one.moved for one in better)} experts would gain {gain * costs.horizon / 1e12:.3g} s in "
        f"{costs.horizon} steps and take {cost / 1e12:.3g} s, or gain less than margin={costs.margin_ppm / 1e6:g} of a layer's "
        "time",
    )  # fmt: skip


def _imbalance(load_E: NDArray[np.int64], placement: Placement) -> float:
    load_P = placement.part_load(load_E)
    return float(load_P.max() / load_P.mean()) if load_P.any() else 1.0
