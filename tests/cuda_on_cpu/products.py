# SPDX-License-Identifier: Apache-2.0
"""What CUDA's grouped product asks of its operands, checked on every call on fake tensors, whose meta kernel asks less."""

from __future__ import annotations

from typing import Any
from unittest import mock

import cuda_bytes
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F


def faults(a: Tensor, b: Tensor, offs: Tensor | None) -> list[str]:
    """The rules of the kernel for bfloat16 that a call breaks: strides and addresses of 16 bytes, offsets in int32."""
    found = []
    for name, x in (("first", a), ("second", b)):
        if x.dtype != torch.bfloat16:
            found.append(f"the {name} factor is {x.dtype}, not bfloat16")
        strides = x.stride()[-2:]
        if 1 not in strides:
            found.append(f"the {name} factor has strides {x.stride()}, none of the last two 1")
        elif max(strides) * x.element_size() % 16:
            found.append(
                f"rows of the {name} factor are {max(strides) * x.element_size()} bytes apart, no multiple of 16"
            )
        if x.storage_offset() * x.element_size() % 16:
            found.append(f"the {name} factor begins {x.storage_offset() * x.element_size()} bytes into its storage")
        if not x.is_cuda:
            found.append(f"the {name} factor is on {x.device}")
    if offs is None or offs.dtype != torch.int32 or not offs.is_cuda or not offs.is_contiguous():
        found.append(f"offsets are {offs if offs is None else (offs.dtype, offs.device)}, not int32 on the device")
    if a.dim() == b.dim() == 2 and not (a.stride(0) == 1 and b.stride(1) == 1):
        found.append(
            f"a weight's gradient needs column-major by row-major for empty groups, not {a.stride()} by {b.stride()}"
        )
    return found


def check() -> dict[str, Any]:
    """Every grouped product of both slices; and what the validator says of calls that a kernel refuses."""
    seen: list[tuple[int, int]] = []
    broken: list[str] = []
    plain = F.grouped_mm

    def watched(a: Tensor, b: Tensor, *, offs: Tensor | None = None, **options: Any) -> Tensor:
        seen.append((a.dim(), b.dim()))
        broken.extend(faults(a, b, offs))
        return plain(a, b, offs=offs, **options)

    with mock.patch.object(F, "grouped_mm", watched):
        for layer in cuda_bytes.SLICES.values():
            cuda_bytes.count(layer, tokens=1024, length=512)
    with FakeTensorMode():
        good = torch.empty(32, 64, dtype=torch.bfloat16, device="cuda")
        stack = torch.empty(4, 64, 48, dtype=torch.bfloat16, device="cuda")
        offs = torch.empty(4, dtype=torch.int32, device="cuda")
        planted = {
            "nothing": faults(good, stack, offs),
            "float32": faults(good.float(), stack, offs),
            "odd rows": faults(torch.empty(32, 66, dtype=torch.bfloat16, device="cuda")[:, :64], stack, offs),
            "odd address": faults(
                torch.empty(32 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(32, 64), stack, offs
            ),
            "int64": faults(good, stack, offs.long()),
            "row by row": faults(good, good, offs),
        }
    return {"seen": sorted(map(list, set(seen))), "calls": len(seen), "broken": broken, "planted": planted}
