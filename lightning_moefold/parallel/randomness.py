# SPDX-License-Identifier: Apache-2.0
"""The states of all random generators of a rank, for a pass that is to draw what an earlier one drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states


class Randomness:
    """Those of torch, Python and NumPy on the host, and that of a device: code of the user's may draw from any."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, Any] = _collect_rng_states(include_cuda=False)
        self._device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self, device: torch.device) -> None:
        """Sets all generators, and that of this device, to these states."""
        _set_rng_states(self._host)
        if self._device is not None:
            torch.cuda.set_rng_state(self._device, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, what is drawn is what was drawn from these states on; after it, as if nothing had been drawn."""
        now = Randomness(self.device)
        self.restore(self.device)
        try:
            yield
        finally:
            now.restore(self.device)
