# SPDX-License-Identifier: Apache-2.0
"""How often the host asks the device for a value: what the modules of the dispatchers promise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold import Fold
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.dispatch.host import to_device
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import MoELayer
from lightning_moefold.testing import RankPool

DROPLESS, DROPPING, PADDED = {}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0, "pad_to_capacity": True}


class _Questions(TorchDispatchMode):
    """Counts operators whose result the host must see: values, and sizes that depend on data."""

    ASK = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "repeat_interleave.Tensor",
        "unique",
        "bincount",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func).removeprefix("aten."), kwargs or {}
        if any(name.startswith(ask) for ask in self.ASK) and kwargs.get("output_size") is None:
            self.found.append(name)
        return func(*args, **kwargs)


def count_questions(fold: str, fields: dict[str, Any]) -> list[str]:
    """Of one layer, forward and backward; lists count once."""
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    layer = MoELayer(16, 8, 3, 8, dispatch=DispatchConfig(**fields))
    layer.bind(mesh)
    layer.experts.kernel = "grouped_mm"
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = getattr(layer.experts, name).detach()[: 8 // mesh.ep.size]
        setattr(
            layer.experts, name, torch.nn.Parameter(stack[:, : 8 // mesh.etp.size] if name != "down_proj" else stack)
        )
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    with _Questions() as questions:

        def asked(name: str) -> Any:
            real = getattr(Tensor, name)

            def ask(tensor: Tensor) -> Any:
                questions.found.append(name)
                return real(tensor)

            return mock.patch.object(Tensor, name, ask)

        with asked("tolist"), asked("cpu"):
            layer(x).square().sum().backward()
    return questions.found


def test_arrays_of_the_host_travel_as_one() -> None:
    arrays = [np.arange(3), np.zeros((2, 0), dtype=np.int64), np.arange(12).reshape(2, 3, 2)]
    found = to_device(arrays, torch.device("cpu"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    assert all(np.array_equal(tensor.numpy(), array) for tensor, array in zip(found, arrays, strict=True))


@pytest.mark.parametrize(
    ("fold", "fields", "expected"),
    [
        ("", DROPLESS, []),
        ("", DROPPING, ["_local_scalar_dense.default"]),
        ("", PADDED, []),
        ("ep2", DROPLESS, ["tolist"]),
        ("ep2", {"dispatch_chunks": 2}, ["tolist"]),
        ("ep2", {"copies": ExpertCopies("greedy")}, ["cpu"]),
        ("ep2", DROPPING, ["tolist"]),
        ("ep2", PADDED, []),
        ("ep2", {"dispatcher": "allgather"}, ["tolist"]),
        ("ep2", {"dispatcher": "deduplicated"}, ["tolist"]),
        ("ep4", {"dispatcher": "hierarchical", "node_size": 2}, ["tolist", "tolist"]),
    ],
)
def test_the_host_waits_once_for_each_exchange(
    pool: RankPool, fold: str, fields: dict[str, Any], expected: list[str]
) -> None:
    fields = {("chunks" if k == "dispatch_chunks" else k): v for k, v in fields.items()}
    ranks = int(fold[-1:] or 1)
    assert pool.run(count_questions, fold, fields, ranks=ranks) == [expected] * ranks
