# SPDX-License-Identifier: Apache-2.0
"""Placements found offline: the search, the file, and the live choice among them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies import POLICIES, make_policy
from lightning_moefold.balance.pool import PlacementPool, search_pool
from lightning_moefold.balance.replay import replay
from lightning_moefold.balance.slow import SlowLoop
from lightning_moefold.balance.trace import RoutingTrace
from lightning_moefold.callbacks import ExpertRebalancer
from lightning_moefold.cli.main import main
from lightning_moefold.errors import InputError

#: Copies are dear: only moves help.
COSTS = BalanceCosts(
    row_ps=1000, product_ps=0, near_copy_ps=10**9, far_copy_ps=10**9, exchange_ps=0, near_move_ps=100_000,
    far_move_ps=1_000_000, copy_bytes=10, move_bytes=30, parts_per_node=8,
)  # fmt: skip


def phases() -> RoutingTrace:
    """Two patterns by turns, each with two hot experts on one rank of two, which other homes would part."""
    patterns = np.array([[[400, 400, 10, 10, 20, 20, 30, 30]], [[10, 10, 400, 400, 20, 20, 30, 30]]])
    counts_NLE = np.concatenate([np.repeat(patterns[[n % 2]], 12, 0) for n in range(4)])
    return RoutingTrace(np.arange(len(counts_NLE)) * 10 + 10, counts_NLE[:, :, None], "phases")


def busiest(placement: Placement, load_NE: np.ndarray) -> int:
    return int(sum(placement.part_load(load_E).max() for load_E in load_NE))


def test_the_search_serves_every_phase() -> None:
    """No pair of candidates serves the trace better, and a placement that no phase needs is not kept."""
    trace = phases()
    pool = search_pool(trace, COSTS, 2, 0)
    load_NE = trace.counts_NLSE.sum(2)[:, 0]
    best = [min(int(p.part_load(load_E).max()) for p in pool.layers[0]) for load_E in load_NE]
    every = [Placement((*first, *(e for e in range(8) if e not in first)), 2) for first in combinations(range(8), 4)]
    least = [min(int(p.part_load(load_E).max()) for p in every) for load_E in load_NE]
    assert best == least
    assert 1 <= len(pool.layers[0]) <= 2


def test_a_file_and_back(tmp_path: Path) -> None:
    pool = search_pool(phases(), COSTS, 4, 1)
    pool.save(tmp_path / "pool.json")
    again = PlacementPool.load(tmp_path / "pool.json")
    assert [[p.part_of_expert for p in layer] for layer in again.layers] == [
        [p.part_of_expert for p in layer] for layer in pool.layers
    ]


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "joint"])
def test_a_policy_takes_what_is_better(name: str) -> None:
    load_NE = phases().counts_NLSE.sum(2)[:4, 0]
    policy, current = make_policy(name, 0), Placement.contiguous(8, 2)
    offered = Placement((0, 4, 2, 6, 1, 5, 3, 7), 2)
    own = policy.place(load_NE, current, COSTS)
    chosen = policy.choose(load_NE, current, COSTS, [offered])
    assert busiest(chosen, load_NE) == min(busiest(own, load_NE), busiest(offered, load_NE))
    assert chosen.part_of_expert in (own.part_of_expert, offered.part_of_expert)
    if name == "contiguous":
        assert chosen.part_of_expert == offered.part_of_expert
        assert [a == b for a, b in zip(chosen.expert_of_slot, current.expert_of_slot, strict=True)].count(True) == 4


def test_joint_weighs_it_like_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without candidates of its own it takes the pool's; not where moving is too dear, nor where it is no better."""
    monkeypatch.setattr("lightning_moefold.balance.relocate.candidates_for", lambda _, here_E, *__: [here_E] * 4)
    load_NE = phases().counts_NLSE.sum(2)[:8, 0]
    policy, current = make_policy("joint", 0), Placement.contiguous(8, 2)
    offered = Placement((0, 4, 2, 6, 1, 5, 3, 7), 2)
    assert policy.choose(load_NE, current, COSTS) is current
    # Of the four moves, those are taken back that gain nothing.
    chosen = policy.choose(load_NE, current, COSTS, [current, offered])
    assert busiest(chosen, load_NE) <= busiest(offered, load_NE) < busiest(current, load_NE)
    dear = BalanceCosts(**{**vars(COSTS), "near_move_ps": 10**12})
    assert policy.choose(load_NE, current, dear, [offered]) is current
    assert policy.choose(load_NE, offered, COSTS, [current]) is offered


def test_the_loop_and_a_replay_ask_for_it() -> None:
    trace = phases()
    pool = search_pool(trace, COSTS, 2, 0)
    rows = {"layer": trace.counts_NLSE.sum(2)[0, 0]}
    here = {"layer": Placement.contiguous(8, 2)}
    for policy in ("llep", lambda load_NE, current, costs: current):
        alone, loop = SlowLoop(policy, 1, 0.0), SlowLoop(policy, 1, 0.0)
        loop.offer(pool.by_name(["layer"], here))
        assert not alone.decide(1, rows, here, COSTS, 100).placements
        decision = loop.decide(1, rows, here, COSTS, 100)
        assert decision.placements["layer"].part_of_expert in [p.part_of_expert for p in pool.layers[0]]
        assert decision.after < decision.before
    policy = make_policy("contiguous", 0)
    assert replay(trace, policy, COSTS, 2, pool=pool).imbalance < replay(trace, policy, COSTS, 2).imbalance


def test_a_dear_placement_hides_no_cheap_one() -> None:
    """The pool's is better by a little and moves more; the policy's move is made, with the pool as without it."""
    load_NE = np.array([[400, 400, 110, 100, 100, 90, 90, 90]])
    here, dear = {"layer": Placement.contiguous(8, 2)}, Placement((0, 2, 5, 6, 1, 3, 4, 7), 2)
    swapped = Placement((0, 4, 2, 3, 1, 5, 6, 7), 2)
    costs = BalanceCosts(**{**vars(COSTS), "near_move_ps": 700_000})
    found = []
    for pool in ({}, {"layer": (dear,)}):
        loop = SlowLoop(lambda load_NE, current, costs: swapped, 1)
        loop.offer(pool)
        found.append(loop.decide(1, {"layer": load_NE[0]}, here, costs, 4).placements)
    assert busiest(dear, load_NE) < busiest(swapped, load_NE) < busiest(here["layer"], load_NE)
    assert found[0] == found[1] == {"layer": swapped}


def test_the_command_writes_and_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "pool.json")
    arguments = ["balance", "hot_rank", "--ep", "8", "--policies", "contiguous"]
    assert main([*arguments, "--write-pool", file]) == 0
    assert "placements of" in capsys.readouterr().out
    found = []
    for more in ([], ["--pool", file]):
        assert main([*arguments, "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["policies"][0]["imbalance"])
    assert found[1] < found[0]
    assert main([*arguments[:3], "4", "--pool", file]) != 0
    assert "over ep=8" in capsys.readouterr().err


def test_bad_input(tmp_path: Path) -> None:
    for content in ("", "{}", '{"parts": 2, "layers": [[[0, 0, 0, 1]]]}', '{"parts": 0, "layers": [[[0, 0]]]}', "[1]"):
        (tmp_path / "pool.json").write_text(content)
        with pytest.raises(InputError, match=r"pool.json is no pool of placements .*--write-pool"):
            PlacementPool.load(tmp_path / "pool.json")
    with pytest.raises(InputError, match="is no pool of placements"):
        ExpertRebalancer(pool=tmp_path / "none.json")
    with pytest.raises(InputError, match="at least one of each layer"):
        PlacementPool(((Placement.contiguous(4, 2),), ()))
    with pytest.raises(InputError, match="same number of experts and parts"):
        PlacementPool(((Placement.contiguous(4, 2),), (Placement.contiguous(4, 4),)))
    pool = PlacementPool(((Placement.contiguous(4, 2),),))
    with pytest.raises(
        InputError, match=r"1 layers of 4 experts over ep=2, and this run has 2 layers of 4 experts over ep=2"
    ):
        pool.by_name(["a", "b"], {"a": Placement.contiguous(4, 2), "b": Placement.contiguous(4, 2)})
    pool.save(tmp_path / "pool.json")
    with pytest.raises(InputError, match="slow=False moves none"):
        ExpertRebalancer(slow=False, pool=tmp_path / "pool.json")
