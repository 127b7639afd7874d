# SPDX-License-Identifier: Apache-2.0
"""Where groups lie on nodes, against the rank lists of Fold; and collective costs."""

from itertools import islice

import pytest

from lightning_moefold.fold import AXES, JOINT_AXES, Fold
from lightning_moefold.planner.machine.hardware import PRESETS
from lightning_moefold.planner.machine.links import GroupShape, Links, axis_shape


def placed(groups, per_node):
    """The widest group and the fewest ranks that one of the widest groups has on a node."""
    shapes = []
    for group in groups:
        nodes = [rank // per_node for rank in group]
        shapes.append((len(set(nodes)), min(nodes.count(n) for n in nodes)))
    widest = max(n for n, _ in shapes)
    return widest, min(local for n, local in shapes if n == widest)


@pytest.mark.parametrize(("world", "per_node"), [(16, 4), (16, 8), (24, 8), (12, 8), (36, 4), (8, 8)])
def test_shapes_are_those_of_the_rank_groups(world, per_node):
    for fold in islice(Fold.enumerate(world), 0, None, 5):
        for axis in (*AXES, *JOINT_AXES):
            shape = axis_shape(fold, axis, per_node)
            assert shape.size == fold.size(axis)
            assert (shape.nodes, shape.local) == placed(fold.groups(axis), per_node), (str(fold), axis)


def test_folding_keeps_the_exchange_in_the_node():
    coupled = Fold.parse("tp2 pp8 | ep8 etp2", 128)
    folded = Fold.parse("tp2 pp8 | ep8", 128)
    links = Links(PRESETS["dgx-h100"])
    inside, outside = axis_shape(folded, "ep", 8), axis_shape(coupled, "ep", 8)
    assert not inside.crosses
    assert outside.crosses
    assert links.exchange(inside, 1e8) < links.exchange(outside, 1e8) / 3


def test_costs_by_hand():
    hardware = PRESETS["dgx-h100"]
    links = Links(hardware)
    assert links.gather(GroupShape(1, 1, 1), 1e9) == 0
    inside = links.gather(GroupShape(8, 1, 8), 8e9)
    assert inside == pytest.approx(7e9 / (450e9 * hardware.intra.efficiency), rel=1e-2)
    # One rank a node has one port; four of them have four.
    one = links.gather(GroupShape(16, 16, 1), 16e9)
    four = links.gather(GroupShape(64, 16, 4), 64e9)
    assert one == pytest.approx(15e9 / (50e9 * hardware.inter.efficiency), rel=1e-2)
    assert four == pytest.approx(63e9 / (4 * 50e9 * hardware.inter.efficiency), rel=1e-2)
    assert links.reduce(GroupShape(8, 1, 8), 1e9) == 2 * links.gather(GroupShape(8, 1, 8), 1e9)
    assert links.hidden(1.0, 10.0) == pytest.approx(1 - hardware.kernels.overlap)
    assert links.hidden(10.0, 1.0) == pytest.approx(9 + 1 - hardware.kernels.overlap)
