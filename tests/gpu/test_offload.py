# SPDX-License-Identifier: Apache-2.0
"""State and activations in host memory on CUDA, on streams of their own. Skipped where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_moefold.modules.offload import OffloadedLayer
from lightning_moefold.optim import offload_state
from lightning_moefold.optim.state_offload import bring_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Numbers of a tensor: 64 MiB, so that the allocator gives a freed one as a whole to the next.
NUMBERS = 1 << 24


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.numel() > 1]


def test_state_lands_in_memory_that_is_still_in_use() -> None:
    """A long kernel is queued before one that writes to memory that is freed at once: it must not write over the state."""
    weight = nn.Parameter(torch.ones(NUMBERS, device="cuda"))
    optimizer = offload_state(torch.optim.AdamW([weight], lr=0.1))
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    assert [v.untyped_storage().nbytes() for v in _state(optimizer)] == [0, 0]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used = [torch.zeros(NUMBERS, device="cuda") for _ in range(2)]
    places = {tensor.data_ptr() for tensor in used}
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    for tensor in used:
        tensor.fill_(7.0)
    del tensor, used
    bring_state(optimizer)
    assert {v.data_ptr() for v in _state(optimizer)} == places
    torch.cuda.synchronize()
    first, second = _state(optimizer)
    torch.testing.assert_close(first, torch.full_like(first, 0.2))
    torch.testing.assert_close(second, torch.full_like(second, 4e-3))


def test_activations_of_layers_share_memory() -> None:
    """What comes back of one layer takes the place of what came back of another, and every gradient is that without offloading."""
    layers = [nn.Linear(1, 1, device="cuda") for _ in range(12)]  # weights that are no part of what is kept
    x = torch.rand(NUMBERS, device="cuda")

    def run(offloaded: bool) -> tuple[Tensor, int]:
        start = x.clone().requires_grad_()
        y, before = start, None
        for layer in layers:
            if offloaded:
                with OffloadedLayer(layer, before) as before:
                    y = y.sin()
            else:
                y = y.sin()
            torch.cuda.synchronize()  # memory is given away only when copies are known to be through
            y.register_hook(lambda _: torch.cuda.synchronize())
        y.sum().backward()
        torch.cuda.synchronize()
        assert start.grad is not None
        return start.grad, torch.cuda.memory_reserved()

    exact, _ = run(False)
    torch.cuda.empty_cache()
    base = torch.cuda.memory_reserved()
    found, reserved = run(True)
    assert torch.equal(found, exact)
    assert reserved - base < 10 * x.nbytes  # with streams of its own, each of the 12 layers would take a piece anew
