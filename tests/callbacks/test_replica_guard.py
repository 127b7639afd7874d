# SPDX-License-Identifier: Apache-2.0
"""A bit that differs between copies of a parameter is named, and copies that agree are left alone."""

from __future__ import annotations

import pytest

from lightning_moefold.callbacks import ReplicaGuard
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.callbacks import jobs_replica_guard as jobs
from tests.quick import quick

NORM, EXPERT = "model.model.layers.0.input_layernorm.weight", "model.model.layers.0.mlp.experts.up_proj"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("fold", "sharding", "parameter", "rank", "said"),
    quick(
        [
            ("tp2 | ep2 etp2", "optimizer", NORM, 2, "(layer 0, norm) is replicated on ranks"),
            ("| ep2", "none", EXPERT, 3, "(layer 0, experts) is replicated on ranks 1, 3, but its bits on rank 3"),
            ("pp2 | ep2", "none", NORM, 1, "(layer 0, norm) is replicated on ranks 0, 1, but its bits on rank 1"),
        ],
        ("| ep2", "none", EXPERT, 3, "(layer 0, experts) is replicated on ranks 1, 3, but its bits on rank 3"),
    ),
)  # fmt: skip
def test_a_bit_that_differs(
    pool: RankPool, path: str, fold: str, sharding: str, parameter: str, rank: int, said: str
) -> None:
    assert set(pool.run(jobs.fit, path, fold, sharding, {}, ranks=4)) == {"5 steps"}
    [sentence] = set(pool.run(jobs.fit, path, fold, sharding, {"parameter": parameter, "rank": rank}, ranks=4))
    assert sentence.startswith(f"after step 2, {parameter}"), sentence
    assert said in sentence


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        ReplicaGuard(0)
