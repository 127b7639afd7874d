# SPDX-License-Identifier: Apache-2.0
"""Sums over groups of tokens."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold.modules.routers import statistics
from lightning_moefold.modules.routers.statistics import sum_of_groups


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", ["_by_index", "_by_product"])
def test_sums_and_gradients_are_those_of_index_add(
    way: str, dtype: torch.dtype, bound: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU and, here too, as on CUDA. Group 2 has no tokens; under autocast nothing is rounded to 16 bits."""
    monkeypatch.setattr(statistics, "_by_index", getattr(statistics, way))
    generator = torch.Generator().manual_seed(0)
    x_TE = torch.rand(1000, 8, generator=generator, dtype=dtype).requires_grad_()
    group_T = torch.tensor([0, 1, 3, 4])[torch.randint(4, (1000,), generator=generator)]
    slope_GE = torch.rand(5, 8, generator=generator, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        sums_GE = sum_of_groups(x_TE, group_T, 5)
    expected_GE = torch.zeros(5, 8, dtype=dtype).index_add(0, group_T, x_TE)
    torch.testing.assert_close(sums_GE, expected_GE, rtol=0, atol=bound)
    [grad_TE] = torch.autograd.grad((sums_GE * slope_GE).sum(), x_TE)
    assert torch.equal(grad_TE, slope_GE[group_T])


def test_without_tokens() -> None:
    assert torch.equal(sum_of_groups(torch.ones(0, 3), torch.ones(0, dtype=torch.int64), 2), torch.zeros(2, 3))
