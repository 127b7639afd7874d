# SPDX-License-Identifier: Apache-2.0
"""A dispatcher on the ranks of the pool, compared with a loop over tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.dispatch import AllToAllDispatcher
from lightning_moefold.mesh import FoldedMesh

EXPERTS, TOP, SIZE = 8, 2, 3


def _routing(kind: str, rank: int) -> tuple[int, Tensor, Tensor | None]:
    """Tokens, their experts, and which are routed; different on every rank."""
    generator = torch.Generator().manual_seed(17 * rank + 1)
    tokens = {"uneven": 3 + 4 * rank, "one rank empty": 0 if rank == 1 else 6, "all empty": 0}.get(kind, 7)
    expert = (
        torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(tokens)]) if tokens else None
    )
    expert = torch.empty(0, TOP, dtype=torch.int64) if expert is None else expert
    if kind == "all to one":
        expert = torch.tensor([5, 0]).expand(tokens, TOP).clone()
    routed = None
    if kind == "padding":
        routed = torch.rand(tokens, generator=generator) > 0.4
    if kind == "a rank of padding":
        routed = torch.full((tokens,), rank != 0)
    return tokens, expert, routed


def _expert(index: int, x: Tensor, part: int, parts: int) -> Tensor:
    """Expert ``index`` scales each column by numbers of its own; an etp rank has a share of the result."""
    share = 1.0 / parts + (part - (parts - 1) / 2) * 0.1  # shares differ, and sum to one
    return x * (index + 1.5) * torch.arange(1, SIZE + 1, dtype=x.dtype) * share


def check(folds: list[str], kinds: list[str]) -> int:
    """Output, gradient of the input and of the weights, against a loop, in float64."""
    torch.set_default_dtype(torch.float64)
    cases = 0
    for text in folds:
        fold = Fold.parse(text, dist.get_world_size())
        mesh = FoldedMesh(fold, "cpu")
        dispatcher = AllToAllDispatcher(EXPERTS, mesh.ep, mesh.etp, mesh.axis("etp_ep"))
        for kind in kinds:
            _check_one(dispatcher, mesh, kind, f"{text} {kind}")
            cases += 1
    return cases


def _check_one(dispatcher: AllToAllDispatcher, mesh: FoldedMesh, kind: str, what: str) -> None:
    tokens, expert, routed = _routing(kind, mesh.rank)
    generator = torch.Generator().manual_seed(100 + mesh.rank)
    x, slope = torch.randn(2, tokens, SIZE, generator=generator).unbind(0)
    weight = torch.rand(tokens, TOP, generator=generator)
    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    rows, plan = dispatcher.dispatch_preprocess(inputs[0], expert, routed)
    arrived = dispatcher.dispatch_postprocess(dispatcher.token_dispatch(rows, plan), plan)
    local = EXPERTS // mesh.ep.size
    assert int(plan.counts_L.sum()) == arrived.shape[0], what
    parts = [
        _expert(mesh.ep.index * local + i, part, mesh.etp.index, mesh.etp.size)
        for i, part in enumerate(arrived.split(plan.counts_L.tolist()))
    ]
    back = dispatcher.token_combine(dispatcher.combine_preprocess(torch.cat(parts), plan), plan)
    output = dispatcher.combine_postprocess(back, inputs[1], plan)
    (output * slope).sum().backward()

    naive = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = [torch.zeros(SIZE) for _ in range(tokens)]
    for t in range(tokens):
        for k in range(TOP):
            if routed is None or bool(routed[t]):
                expected[t] = expected[t] + naive[1][t, k] * _expert(int(expert[t, k]), naive[0][t], 0, 1)
    whole = torch.stack(expected) if tokens else torch.zeros(0, SIZE)
    if whole.requires_grad:
        (whole * slope).sum().backward()
    pairs = [(output, whole), *((a.grad, b.grad) for a, b in zip(inputs, naive, strict=True))]
    for name, (a, b) in zip(("output", "gradient of x", "gradient of the weights"), pairs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}, {what}: {m}")
