# SPDX-License-Identifier: Apache-2.0
"""What each context parallel rank computes from gathered keys, one rank after the other on one device, against all scores."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor

from lightning_moefold.async_comm import Route
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention import exchanges, head_groups
from lightning_moefold.modules.attention.blockwise import Span, Visibility
from lightning_moefold.modules.attention.context import context_attention
from lightning_moefold.modules.attention.layout import ContextLayout

RANKS = (0, 1, 2, 3)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def naive(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``[B, S, heads, d]``, in float64, scores and all."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2)


class Network:
    """Stands in for the collectives: knows the keys and values of all ranks, and adds up the gradients that each rank sends.

    Args:
        pair_N2Vd: Keys and values of all ranks, one rank after the other.
    """

    def __init__(self, pair_N2Vd: Tensor) -> None:
        self.pair = pair_N2Vd
        self.grad = torch.zeros_like(pair_N2Vd, dtype=torch.float64)
        self.heads: list[slice] = []

    def gather(self, message_M2vd: Tensor, rank: int) -> Tensor:
        """Finds out which heads a rank sends, and returns those of all ranks."""
        count, some = message_M2vd.shape[0], message_M2vd.shape[1] // 2
        mine = self.pair[rank * count : (rank + 1) * count]
        for first in range(self.pair.shape[2] - some + 1):
            heads = slice(first, first + some)
            if torch.equal(mine[:, :, heads].flatten(1, 2), message_M2vd):
                self.heads.append(heads)
                return self.pair[:, :, heads].flatten(1, 2)
        raise AssertionError("these are no keys and values of this rank")

    def scatter(self, message_N2vd: Tensor) -> Tensor:
        """Adds gradients of the heads that were gathered longest ago."""
        heads = self.heads.pop(0)
        self.grad[:, :, heads] += message_N2vd.unflatten(1, (2, -1))
        return message_N2vd[: len(message_N2vd) // len(RANKS)]


def errors(
    kind: str, window: int | None, dtype: torch.dtype, device: torch.device, *, length: int, heads: int, kv_heads: int,
    size: int, groups: int,
) -> list[float]:  # fmt: skip
    """Returns the relative errors of outputs and of the gradients of queries, keys and values.

    Args:
        kind: What hides keys: ``"documents"`` or padding at the ``"left"``.
        window: A query sees at most this many keys.
        dtype: Of queries, keys and values.
        device: The same; the default device stays as it is, so that tensors made elsewhere are noticed.
        length: Number of positions of a row.
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        size: Head size.
        groups: Number of messages in which the heads travel.
    """
    torch.manual_seed(0)
    rows = 2
    real = torch.ones(rows, length, dtype=torch.bool, device=device)
    visibility = Visibility(window, (torch.rand(rows, length, device=device) < 0.03).cumsum(1))
    if kind == "left":
        real[0, : length // 3] = False
        visibility = Visibility(window, None, real)
    row = Span(0, length)
    like = {"dtype": dtype, "device": device}
    q, k, v = (torch.randn(rows, length, h, size, **like, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    slope = torch.randn(rows, length, heads, size, **like) * real[..., None, None]
    exact = naive(q, k, v, visibility.of(row, row, device))
    exact_grads = torch.autograd.grad(exact, (q, k, v), slope.double())

    held_GL = ContextLayout(length, Axis("cp", RANKS)).held(q.device)
    network = Network(torch.stack((k, v), 2)[:, held_GL].transpose(0, 1).flatten(0, 2).detach())
    found, grad_q = torch.zeros_like(exact), torch.zeros_like(q)
    for rank, place in enumerate(held_GL):

        class Handle:
            """Of one rank."""

            def __init__(self, routes: Sequence[Route], axis: Axis, *, yields: bool, rank: int = rank) -> None:
                self.kind, self.rank = routes[0].kind, rank

            def start(self, messages: Sequence[Tensor]) -> None:
                (message,) = messages
                self.arrived = (
                    network.gather(message, self.rank) if self.kind == "all-gather" else network.scatter(message)
                )

            def wait(self) -> list[Tensor]:
                return [self.arrived]

        mine = [x[:, place].detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
        message = 2 * mine[1][:, : kv_heads // groups].numel() * mine[1].element_size()
        with mock.patch.object(head_groups, "Handle", Handle), mock.patch.object(exchanges, "MESSAGE_BYTES", message):
            layout = ContextLayout(length, Axis("cp", RANKS, rank))
            y = context_attention(*mine, layout, visibility, "all_gather")
            assert len(network.heads) == groups
            network.heads.clear()
            y.backward(slope[:, place].transpose(1, 2))
        assert not network.heads
        found[:, place], grad_q[:, place] = y.transpose(1, 2).to(found.dtype), mine[0].grad.transpose(1, 2)  # type: ignore[union-attr]
    order = torch.argsort(held_GL.flatten())
    grad_k, grad_v = network.grad.unflatten(0, (4, rows, -1)).transpose(0, 1).flatten(1, 2)[:, order].unbind(2)
    compared = zip((grad_q, grad_k, grad_v), exact_grads, strict=True)
    return [relative_error(found[real], exact[real]), *(relative_error(a, b) for a, b in compared)]
