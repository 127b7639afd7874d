# SPDX-License-Identifier: Apache-2.0
"""Every optimizer that treats elements one by one is exact under every fold, whatever its groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool
from tests.exactness import compare, matrix
from tests.exactness.optimizers import FACTORIES
from tests.quick import quick

#: Both meshes with two axes; experts cut within; and more data ranks than rows of some parameters (edp4 with 4 experts, dp4).
FOLDS = ["tp2 | ep2", "tp2 | ep2 etp2", "", "tp4 | etp2"]


#: Those that do not differ in kind from others.
RARE = {"adadelta", "adamax", "radam", "nadam", "asgd", "adam amsgrad", "adamw foreach", "sgd foreach", "lion"}
CASES = quick(
    [pytest.param(n, marks=pytest.mark.slow) if n in RARE else n for n in FACTORIES],
    "groups with schedules",
)


@pytest.mark.parametrize("name", CASES)
def test_exact(pool: RankPool, folder: Path, name: str) -> None:
    place = list(FACTORIES).index(name)
    row = {
        **matrix.PLAIN,
        "family": matrix.FACTORS["family"][place % 3],
        "shape": "28 heads" if place % 2 else "6 experts, tied",
        "auxiliary": True,
        "ignore": "uneven",
        "frozen": "first stage" if place % 4 == 1 else "nothing",
        "sharding": matrix.FACTORS["sharding"][place // 2 % 3],
        "optimizer": FACTORIES[name],
        "zero_everything": name == "some parameters",
    }
    compare.check(pool, folder, Fold.parse(FOLDS[place % len(FOLDS)], 4), row, seed=place)
