# SPDX-License-Identifier: Apache-2.0
"""Readers of one tensor: the sum of their gradients, in their order."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold.kernels.fan_out import fan_out


@pytest.mark.parametrize("readers", [2, 3, 4])
def test_the_sum_in_the_order_of_the_readers(readers: int) -> None:
    """Whatever the order in which their gradients come; numbers of very different size show it."""
    torch.manual_seed(1)
    x = torch.randn(5, 7, requires_grad=True)
    grads = [10.0 ** (3 * n) * torch.randn(5, 7) for n in range(readers)]
    expected = grads[0]
    for grad in grads[1:]:
        expected = expected + grad
    outputs = fan_out(x, readers)
    assert all(out.data_ptr() == x.data_ptr() for out in outputs)  # no copies
    for order in (range(readers), reversed(range(readers))):
        terms = [(outputs[n] * grads[n]).sum() for n in order]
        [found] = torch.autograd.grad(torch.stack(terms).sum(), x, retain_graph=True)
        assert torch.equal(found, expected)
