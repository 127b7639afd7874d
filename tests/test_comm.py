# SPDX-License-Identifier: Apache-2.0
"""The collectives are called by the names that the installed torch does not warn of; linear steps are differentiated once."""

import warnings

import pytest
import torch
import torch.distributed as dist

from lightning_moefold import comm


def test_no_deprecated_collectives(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for collective in (getattr(dist, comm.ALL_GATHER), getattr(dist, comm.REDUCE_SCATTER)):
                out = torch.zeros(3)
                collective(out, torch.arange(3.0), group=dist.group.WORLD)
                assert out.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()


def test_a_second_derivative_is_an_error() -> None:
    """Instead of silently zero; first derivatives with ``create_graph=True`` are what they are without."""
    x = torch.randn(3, requires_grad=True)
    y = comm.linear(x, lambda x: 2 * x, lambda grad: 2 * grad).square().sum()
    [once] = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(once, 8 * x)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
