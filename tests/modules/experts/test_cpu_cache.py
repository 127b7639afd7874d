# SPDX-License-Identifier: Apache-2.0
"""Memory that is lent again: never to two at once, never more than was in use, and the experts' results do not notice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules import Experts
from lightning_moefold.modules.experts import cpu_cache
from lightning_moefold.modules.experts.cpu_cache import CpuCachingAllocator


@pytest.fixture(autouse=True)
def from_small_sizes_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cpu_cache.release()
    monkeypatch.setattr(cpu_cache, "SMALLEST", 256)
    yield
    cpu_cache.release()


def _kept(memory: CpuCachingAllocator) -> int:
    return sum(block.numel() for block in memory._free)


def _lend(memory: CpuCachingAllocator, rows: int) -> Tensor:
    return memory.empty(torch.empty(0), rows, 64)


def test_a_block_comes_back_with_the_last_tensor_on_it() -> None:
    memory = CpuCachingAllocator()
    x = _lend(memory, 16)
    assert x.shape == (16, 64)
    assert x.is_contiguous()
    assert not x._is_view()
    assert x.data_ptr() % 64 == 0
    address, part = x.data_ptr(), x[3:5]
    del x
    assert _lend(memory, 16).data_ptr() != address, "a part of the first one is in use"
    del part
    assert address in {_lend(memory, 16).data_ptr() for _ in range(2)} | {_lend(memory, 16).data_ptr()}


def test_nothing_is_lent_twice() -> None:
    memory = CpuCachingAllocator()
    for _ in range(3):
        lent = [_lend(memory, rows).fill_(number) for number, rows in enumerate([16, 16, 16, 5, 40])]
        assert [x.unique().tolist() for x in lent] == [[0], [1], [2], [3], [4]]


def test_sizes_that_differ_little_share_a_block() -> None:
    memory = CpuCachingAllocator()
    first = _lend(memory, 1000)
    address = first.data_ptr()
    del first
    second = _lend(memory, 1003)
    assert second.data_ptr() == address
    assert 1003 * 256 <= second.untyped_storage().nbytes() <= 1003 * 256 * 17 / 16


def test_no_more_is_kept_than_was_in_use() -> None:
    memory = CpuCachingAllocator()
    for rows in (100, 300, 200, 500, 400, 450, 100, 300):
        _lend(memory, rows)
        assert _kept(memory) <= 500 * 256 * 17 / 16
    assert _kept(memory) > 0
    memory.release()
    assert _kept(memory) == 0


def test_what_is_lent_at_release_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, blocks = CpuCachingAllocator(), []
    make = memory._block

    def noted(size: int) -> Tensor:
        block = make(size)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(memory, "_block", noted)
    x, y = _lend(memory, 100), _lend(memory, 200)
    memory.release()
    del y
    assert _kept(memory) == 0
    assert [block() is None for block in blocks] == [False, True], "x does not keep what y had"
    del x
    assert _kept(memory) == 0
    _lend(memory, 100)
    assert _kept(memory) > 0


def test_small_blocks_and_other_devices_are_left_to_their_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CpuCachingAllocator()
    assert memory.empty(torch.empty(0, device="meta"), 800).is_meta
    with FakeTensorMode() as fake:
        assert isinstance(memory.empty(fake.from_tensor(torch.empty(0)), 800), FakeTensor)
    with torch.device("meta"):
        assert memory.empty(torch.empty(0, device="cpu"), 80).device == torch.device("cpu")
    assert _kept(memory) == 320
    memory.release()
    monkeypatch.setattr(cpu_cache, "SMALLEST", 4096)
    memory.empty(torch.empty(0), 800)
    assert _kept(memory) == 0


def _step(experts: Experts, counts: list[int]) -> list[Tensor]:
    """Gradients of a forward and backward with these numbers of rows."""
    x = torch.randn(sum(counts), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(counts)))
    weight = torch.linspace(0.5, 1, sum(counts), dtype=torch.float64)
    rows = ExpertRows(token_M=None, weight_M=weight, counts_L=torch.tensor(counts), counts=counts, distinct=True)
    y = experts.compute(x, rows, experts.stacks())
    y.square().sum().backward()
    grads = [p.grad for p in experts.parameters()]
    assert all(g is not None for g in grads)
    experts.zero_grad()
    return grads  # type: ignore[return-value]


COUNTS = [[4, 0, 7], [0, 3, 8], [4, 0, 7], [2, 2, 2]]


def test_gradients_of_experts_on_used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come and go; an expert that has none leaves zeros where another step wrote."""
    torch.manual_seed(0)
    experts = Experts(16, 3, 8).double()
    seen = []
    for counts in COUNTS:
        grads = _step(experts, counts)
        seen.append({g.data_ptr() for g in grads})
        mine = [g.clone() for g in grads]
        del grads
        with monkeypatch.context() as fresh:
            fresh.setattr(cpu_cache, "SMALLEST", 2**40)
            for a, b in zip(mine, _step(experts, counts), strict=True):
                assert torch.equal(a, b)
    assert all(addresses == seen[0] for addresses in seen), "the memory of the first gradients serves the later ones"


def test_two_steps_alive_at_once() -> None:
    """Gradients that somebody keeps are not written over; activations of two forwards do not meet."""
    experts = Experts(16, 3, 8).double()
    first = _step(experts, COUNTS[0])
    copies = [g.clone() for g in first]
    _step(experts, COUNTS[1])
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    rows = ExpertRows(
        token_M=None, weight_M=torch.ones(6).double(), counts_L=torch.tensor([2, 2, 2]), counts=[2, 2, 2], distinct=True
    )
    x, z = torch.randn(2, 6, 16, dtype=torch.float64)
    alone = torch.autograd.grad(experts.compute(x, rows, experts.stacks()).square().sum(), list(experts.parameters()))
    held = experts.compute(x, rows, experts.stacks()).square().sum()
    experts.compute(z, rows, experts.stacks()).square().sum().backward()
    for a, b in zip(torch.autograd.grad(held, list(experts.parameters())), alone, strict=True):
        assert torch.equal(a, b)


def test_compiled() -> None:
    """Tracing a layer meets no memory of ours."""
    experts = Experts(16, 3, 8)
    x = torch.randn(6, 16)
    rows = ExpertRows(
        token_M=None, weight_M=torch.ones(6), counts_L=torch.tensor([2, 2, 2]), counts=[2, 2, 2], distinct=True
    )

    def loss(x: Tensor) -> Tensor:
        return experts.compute(x, rows, experts.stacks()).square().sum()

    expected = torch.autograd.grad(loss(x), list(experts.parameters()))
    found = torch.autograd.grad(torch.compile(loss, backend="eager")(x), list(experts.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
