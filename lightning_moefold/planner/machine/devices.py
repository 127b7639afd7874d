# SPDX-License-Identifier: Apache-2.0
"""Finds the machine that a GPU belongs to by the GPU's name. Pure Python.

A preset describes a whole machine: the rates of a GPU and the links between GPUs. So a name is accepted only if it
determines both. The links of cards (PCIe, NVL) depend on the machine's builder, a slice of a GPU (MIG) has no link, and
superchips come in several kinds of racks: these must be measured.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from lightning_moefold.errors import HardwareError
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware, Link

#: NVLink of the H800 and the A800: 400 GB/s both ways (NVIDIA H800 and A800 datasheets, SXM columns).
_NVLINK_400 = Link(200e9, 2e-6, 0.80)

#: Patterns of ``torch.cuda.get_device_name`` in lower case, the preset, and the fields that differ; the first match
#: counts.
_MACHINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    # NVIDIA H100 datasheet, SXM column: "NVIDIA H100 80GB HBM3"
    (r"\bh100\b.*\b(hbm3|sxm5?)\b", "dgx-h100", {}),
    # NVIDIA H200 datasheet, SXM column
    (r"\bh200$", "dgx-h200", {}),
    # NVIDIA H800: an H100 with slower NVLink
    (r"\bh800$", "dgx-h100", {"name": "h800", "intra": _NVLINK_400}),
    # NVIDIA A100 datasheet, SXM columns: 1,555 GB/s at 40 GB, 2,039 GB/s at 80 GB
    (r"\ba100-sxm4-40gb$", "a100", {"name": "a100-40gb", "memory_bandwidth": 1.555e12}),
    (r"\ba100-sxm", "a100", {}),
    (r"\ba800-sxm", "a100", {"name": "a800", "intra": _NVLINK_400}),
    # NVIDIA HGX B200 in the Blackwell datasheet
    (r"\bb200$", "b200", {}),
)
_REASONS = (
    (r"\bmig\b", "a slice of a GPU, with a part of its rates"),
    (r"\bpcie\b|\bnvl\b|\bhbm2e\b", "a card, whose links depend on the machine"),
    (r"\bg[bh]\d00\b", "a superchip, whose links depend on the machine"),
)


def find_device(name: str) -> Hardware:
    """Returns the preset of the machines with a GPU of this name.

    Args:
        name: Name returned by ``torch.cuda.get_device_name``, such as ``"NVIDIA H100 80GB HBM3"``.

    Raises:
        HardwareError: If no preset describes the device; the message says how to measure it.
    """
    lower = name.lower().strip()
    reason = next((why for pattern, why in _REASONS if re.search(pattern, lower)), None)
    if reason is None:
        for pattern, preset, changes in _MACHINES:
            if re.search(pattern, lower):
                return replace(PRESETS[preset], **changes)
    raise HardwareError(
        f"the planner knows no machine with {name!r}{f', {reason}' if reason else ''}; measure it with moefold calibrate (or write "
        "a file as docs/planner.md shows, with base = a preset), and give the file as AutoFold(hardware=...)."
    )
