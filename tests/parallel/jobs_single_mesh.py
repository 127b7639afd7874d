# SPDX-License-Identifier: Apache-2.0
"""Jobs: what FSDP2 does with gradients on data meshes of one rank and of several."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold import Fold
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import MoELayer
from lightning_moefold.parallel import Settings, Sharding, local_part, parallelize


class _Spy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))


def reduced(text: str, factor: bool) -> tuple[list[str], int, dict[str, Tensor]]:
    """Operations of FSDP2's reductions, how many there were, and the gradients of this rank.

    Args:
        text: The fold.
        factor: Set a divide factor and force the sum on every mesh, whatever its size.
    """
    torch.manual_seed(0)
    layer = MoELayer(16, 4, 2, 8)
    mesh = FoldedMesh(Fold.parse(text, dist.get_world_size()), "cpu", wrap_single=True)
    parallelize(layer, mesh, Settings(Sharding("optimizer", torch.bfloat16)), torch.device("cpu"))
    units = [m for m in layer.modules() if isinstance(m, FSDPModule)]
    assert len(units) > 1, "FSDP2 casts, so it wraps"
    for unit in units if factor else ():
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    spy, real, calls = _Spy(), _fsdp_param_group.foreach_reduce, 0

    def spied(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        with spy:
            return real(*args, **kwargs)

    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    with mock.patch.object(_fsdp_param_group, "foreach_reduce", spied):
        layer(x).float().square().sum().backward()
    grads = {n: local_part(p.grad).clone() for n, p in layer.named_parameters() if p.grad is not None}
    return spy.names, calls, grads
