# SPDX-License-Identifier: Apache-2.0
"""Attention over a cut row, in a rank of the pool, and the same with a whole mask in one process."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold.async_comm import Handle
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.modules.attention import blockwise, exchanges, head_groups
from lightning_moefold.modules.attention.blockwise import Visibility
from lightning_moefold.modules.attention.context import context_attention
from lightning_moefold.modules.attention.layout import ContextLayout
from tests.modules.attention.flash_on_cpu import Calls, flash_on_cpu

SIZE = 4


def draw(case: dict[str, Any]) -> dict[str, Tensor]:
    """Whole queries, keys, values, the gradient of the output, and what hides keys."""
    chance = torch.Generator().manual_seed(3)
    rows, length = case.get("rows", 2), case["length"]
    tensors = {
        name: torch.randn(rows, heads, length, SIZE, generator=chance, dtype=torch.float64)
        for name, heads in (
            ("q", case["heads"]), ("k", case["kv_heads"]), ("v", case["kv_heads"]), ("grad", case["heads"])
        )
    }  # fmt: skip
    if case.get("documents"):
        borders = torch.rand(rows, length, generator=chance) < 0.2
        tensors["documents"] = borders.cumsum(1)
    if case.get("padding"):
        hidden = torch.tensor([[length // 3], [0], [length // 2 + 1]])[:rows]
        place = torch.arange(length)
        tensors["real"] = place < length - hidden if case["padding"] == "right" else place >= hidden
        if _is_idle(case):  # nobody learns from padding, and what it sees then is nobody's business
            tensors["grad"] = tensors["grad"] * tensors["real"][:, None, :, None]
    return tensors


def naive(case: dict[str, Any]) -> dict[str, Tensor]:
    """Softmax over a whole mask."""
    t = draw(case)
    q, k, v = (t[n].requires_grad_() for n in "qkv")
    distance = torch.arange(case["length"])[:, None] - torch.arange(case["length"])[None]
    seen = (distance >= 0).unsqueeze(0)
    if case.get("window"):
        seen = seen & (distance < case["window"])
    if "documents" in t:
        seen = seen & (t["documents"][:, :, None] == t["documents"][:, None])
    if "real" in t:
        seen = seen & t["real"][:, None]
    seen = (seen | (distance == 0)).unsqueeze(1)
    groups = case["heads"] // case["kv_heads"]
    k_H, v_H = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = ((q @ k_H.mT) / SIZE**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v_H
    out.backward(t["grad"])
    return {"out": _asked_for(out, t, case), "q": q.grad, "k": k.grad, "v": v.grad}


def _is_idle(case: dict[str, Any]) -> bool:
    """Whether what padding sees is not compared: where pieces or the kernel need no mask."""
    return "calls" in case or case.get("rows") == 1


def _asked_for(out: Tensor, t: dict[str, Tensor], case: dict[str, Any], place: slice | Tensor = slice(None)) -> Tensor:
    if "real" not in t or not _is_idle(case):
        return out.detach()
    return out.detach() * t["real"][:, None, place, None]


def attend(case: dict[str, Any]) -> dict[str, Tensor]:
    """On the ranks of one cp group; returns this rank's positions of everything."""
    ranks = tuple(range(dist.get_world_size()))
    cp = Axis("cp", ranks, dist.get_rank(), dist.group.WORLD) if len(ranks) > 1 else SINGLE
    dist.barrier()  # what is refused is refused once all are connected
    t = draw(case)
    layout = ContextLayout(case["length"], cp)
    place = layout.positions()
    q, k, v = (t[n][:, :, place].clone().requires_grad_() for n in "qkv")
    visibility = Visibility(case.get("window"), t.get("documents"), t.get("real"))
    message = case.get("message", exchanges.MESSAGE_BYTES)
    sizes = {"BLOCK": case.get("block", blockwise.BLOCK), "SHORTEST": case.get("shortest", blockwise.SHORTEST)}
    kernel = flash_on_cpu() if "calls" in case else contextlib.nullcontext(Calls())
    with (
        mock.patch.object(exchanges, "MESSAGE_BYTES", message),
        mock.patch.object(exchanges, "SMALL_BYTES", case.get("small", 2**25)),
        mock.patch.multiple(blockwise, **sizes),
        kernel as calls,
    ):
        out = context_attention(q, k, v, layout, visibility, case["exchange"])
        out.backward(t["grad"][:, :, place])
    assert not (case.get("unmasked") and visibility._masks)
    assert len(calls.forward) == len(calls.backward) == case.get("calls", 0), calls
    return {"place": place, "out": _asked_for(out, t, case, place), "q": q.grad, "k": k.grad, "v": v.grad}


def attend_each(cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """:func:`attend` for several cases."""
    return [attend(case) for case in cases]


def order_of_events(case: dict[str, Any]) -> list[str]:
    """What a rank starts, waits for and computes, in order, forward and backward; groups of heads are numbered."""
    events: list[str] = []

    class Noted(Handle):
        def start(self, tensors: Any, *, back: bool = False) -> Any:
            self.name = f"{self.routes[0].kind} {sum(e.startswith(f'start {self.routes[0].kind}') for e in events)}"
            events.append(f"start {self.name}")
            return super().start(tensors, back=back)

        def wait(self) -> Any:
            events.append(f"wait {self.name}")
            return super().wait()

    def noted(name: str) -> Any:
        compute = getattr(head_groups, name)
        return lambda *given: (events.append(name.strip("_")), compute(*given))[1]

    computing = ("_forward", "_backward", "_forward_of_runs", "_backward_of_runs")
    with mock.patch.multiple(head_groups, Handle=Noted, **{name: noted(name) for name in computing}):
        attend(case)
    return events
