# SPDX-License-Identifier: Apache-2.0
"""Routing profiles and traces."""

import json

import numpy as np
import pytest

from lightning_moefold.planner import PROFILES, RoutingProfile, find_routing


def test_balanced_is_balanced():
    for ep in (1, 2, 4, 8):
        assert PROFILES["balanced"].load_factor(8, 2, ep) == pytest.approx(1)


def test_load_grows_with_ep_and_with_skew():
    for name in ("mild", "skewed"):
        loads = [PROFILES[name].load_factor(64, 8, ep) for ep in (1, 2, 4, 8, 16, 32, 64)]
        assert loads == sorted(loads)
        assert loads[0] == pytest.approx(1)
    assert PROFILES["skewed"].load_factor(64, 8, 8) > PROFILES["mild"].load_factor(64, 8, 8) > 1


def test_mild_is_a_fine_tuned_mixtral():
    assert 1.4 < PROFILES["mild"].load_factor(8, 2, 8) < 1.8


def test_no_expert_takes_more_than_every_token():
    shares = RoutingProfile("collapsed", 8.0).expert_shares(32, 2)
    assert shares.max() <= 0.5 + 1e-9
    assert shares.sum(1) == pytest.approx(np.ones(len(shares)))


def test_capacity_bounds_the_load():
    profile = PROFILES["skewed"]
    assert profile.load_factor(64, 8, 8, 1.0) <= 1
    assert profile.load_factor(64, 8, 8, 1.5) < profile.load_factor(64, 8, 8)


@pytest.mark.parametrize("shape", ["layers", "steps", "ranks"])
def test_traces(tmp_path, shape):
    counts = np.ones((8, 3, 4, 16), dtype=np.uint16)
    counts[6:, :, :, 0] = 61  # the last quarter of the steps is what counts
    counts = {"layers": counts[-1].sum(1), "steps": counts.sum(2), "ranks": counts}[shape]
    np.savez(tmp_path / "trace.npz", counts=counts)
    (tmp_path / "trace.json").write_text(json.dumps({"counts": counts.tolist()}))
    for name in ("trace.npz", "trace.json"):
        profile = find_routing(str(tmp_path / name))
        assert profile.load_factor(16, 2, 16) == pytest.approx(16 * 61 / 76)
        assert profile.load_factor(16, 2, 1) == pytest.approx(1)
        # Another number of experts: the popularity curve is cut anew.
        assert profile.expert_shares(64, 2).shape == (3, 64)
        assert profile.expert_shares(64, 2).sum(1) == pytest.approx(np.ones(3))


def test_bad_traces_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.ones(3))
    np.save(tmp_path / "b.npy", np.zeros((2, 4)))
    for name, message in (("a.npz", "no array 'counts'"), ("b.npy", "all counts are zero"), ("c.npz", "neither")):
        with pytest.raises(ValueError, match=message):
            find_routing(str(tmp_path / name))
