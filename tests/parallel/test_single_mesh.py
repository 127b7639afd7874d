# SPDX-License-Identifier: Apache-2.0
"""On a data mesh of one rank FSDP2 casts, and does nothing to gradients; on any other it sums them."""

from __future__ import annotations

import pytest

from lightning_moefold.testing import RankPool, assert_close_by_name
from tests.parallel import jobs_single_mesh
from tests.quick import quick


@pytest.mark.parametrize(("text", "ranks"), quick([("", 1), ("| ep2", 2), ("", 2)], ("| ep2", 2)))
def test_gradients(pool: RankPool, text: str, ranks: int) -> None:
    """The same bits as with a divide factor of 1 and a forced sum on every mesh, without the division."""
    plain = pool.run(jobs_single_mesh.reduced, text, False, ranks=ranks)
    forced = pool.run(jobs_single_mesh.reduced, text, True, ranks=ranks)
    for (names, calls, grads), (_, others, expected) in zip(plain, forced, strict=True):
        assert calls == others > 1
        assert [name for name in names if name.startswith(("div", "mul"))] == []
        assert len(grads) > 3
        assert_close_by_name(grads, expected, 0.0, text)
    alone = [name for names, _, _ in forced for name in names if name.startswith("div")]
    assert bool(alone) == (ranks == 1 or "ep" in text), "torch divides where a mesh of one has a factor"
