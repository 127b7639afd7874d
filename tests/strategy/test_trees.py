# SPDX-License-Identifier: Apache-2.0
"""A model that is not what its configuration declares is one sentence, before anything is cut."""

from __future__ import annotations

import pytest

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_trees


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "qwen", "qwen3_moe", num_experts=4))


@pytest.mark.parametrize(("fold", "ranks"), quick([("", 1), ("tp2 | ep2", 2)], ("tp2 | ep2", 2)))
@pytest.mark.more
def test_changed_models_are_refused(pool: RankPool, path: str, fold: str, ranks: int) -> None:
    for messages in pool.run(jobs_trees.refused, path, fold, ranks=ranks):
        for case, (_, pattern) in jobs_trees.CASES.items():
            assert messages[case].startswith("TreeError"), (case, messages[case])
            assert pattern in messages[case], (case, messages[case])
            assert "\n" not in messages[case]


@pytest.mark.slow
def test_a_part_compiled_in_place(pool: RankPool, path: str) -> None:
    [(compiled, plain)] = pool.run(jobs_trees.compiled_in_place, path, ranks=1)
    assert compiled == pytest.approx(plain, rel=1e-9)


def test_a_wrapped_part_of_a_block(pool: RankPool) -> None:
    for message, losses in pool.run(jobs_trees.own_network, "tp2", "wrapped", ranks=2):
        assert "has no parameter 'o_proj.weight' (any more)" in message
        assert not losses
    for message, losses in pool.run(jobs_trees.own_network, "tp2", "", ranks=2):
        assert (message, len(losses)) == ("no error", 2)
