# SPDX-License-Identifier: Apache-2.0
"""What a rank starts, waits for and computes in a MoE layer, in order, forward and backward; run by the ranks of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.async_comm import Handle
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import Experts, MoELayer
from lightning_moefold.modules.experts import kernels
from lightning_moefold.parallel import Settings, Sharding, parallelize

SIZE, EXPERTS, TOP = 16, 8, 3
Events = list[str]


@contextmanager
def noted(events: Events, who: Callable[[], str] = str) -> Iterator[None]:
    """Writes down flights and experts: ``start`` and ``wait`` (when it is over), ``experts`` and, in backward, ``experts'``;
    after ``who`` it is."""
    start, wait, compute = Handle.start, Handle.wait, Experts.compute
    backward = kernels._ExpertByExpert.backward

    def started(handle: Handle, tensors: Any, **kwargs: Any) -> Any:
        events.append(f"{who()}start")
        return start(handle, tensors, **kwargs)

    def waited(handle: Handle) -> Any:
        arrived = wait(handle)
        events.append(f"{who()}wait")
        return arrived

    def computed(experts: Experts, *args: Any) -> Tensor:
        events.append(f"{who()}experts")
        return compute(experts, *args)

    def went_back(ctx: Any, *grads: Tensor) -> Any:
        events.append(f"{who()}experts'")
        return backward(ctx, *grads)

    with ExitStack() as stack:
        for target, name, replacement in (
            (Handle, "start", started),
            (Handle, "wait", waited),
            (Experts, "compute", computed),
            (kernels._ExpertByExpert, "backward", staticmethod(went_back)),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def order(fold: str, fields: dict[str, Any]) -> tuple[Events, Events]:
    """Of a layer with a shared expert, whose products are ``in`` and ``out``; forward, and backward."""
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    torch.manual_seed(0)
    layer = MoELayer(SIZE, EXPERTS, TOP, 8, shared_ffn_hidden_size=8, dispatch=DispatchConfig(**fields))
    parallelize(layer, mesh, Settings(Sharding("none")), torch.device("cpu"))
    events: Events = []
    assert layer.shared_expert is not None
    for name, what in (("gate_proj", "in"), ("up_proj", "in"), ("down_proj", "out")):
        product = getattr(layer.shared_expert, name)
        product.register_forward_hook(lambda *_, what=what: events.append(what))
        product.register_full_backward_hook(lambda *_, what=what: events.append(f"{what}'"))
    x = torch.randn(1, 12, SIZE, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    with noted(events):
        output = layer(x)
        forward = list(events)
        events.clear()
        output.sum().backward()
    return forward, events
