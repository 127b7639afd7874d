# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of matrix products, attention and element-wise work on one rank. Pure Python.

A product of sides m, n, k reaches ``e * m/(m+h) * n/(n+h) * k/(k+h)`` of the peak: tiles at the borders are partly
empty, and each tile has a start and an end that do not depend on k. It is never faster than its operands can be read
from memory. So the many small products of fine-grained experts, and every product that tp or etp cuts, are slower than
their FLOPs suggest.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_moefold.planner.machine.hardware import Hardware


@dataclass(frozen=True)
class Compute:
    """Kernel times on a machine, in seconds.

    Args:
        hardware: The machine.
        dtype: Data type of matrix products.
        width: Bytes per number of an operand.
    """

    hardware: Hardware
    dtype: str
    width: int

    def gemm(self, m: float, n: float, k: float, groups: int = 1) -> float:
        """Returns the seconds of ``groups`` products of [m, k] and [k, n]; backward has the same sides in another order."""
        if min(m, n, k, groups) <= 0:
            return 0.0
        kernels = self.hardware.kernels
        # The overhead of a tile does not shrink with its product's time, so faster units need longer sides.
        half = kernels.gemm_half_size
        if self.dtype == "fp8":
            half *= self.hardware.peak("fp8") / self.hardware.peak("bf16")
        efficiency = kernels.gemm_efficiency * m / (m + half) * n / (n + half) * k / (k + half)
        busy = 2 * m * n * k / (self.hardware.peak(self.dtype) * efficiency)
        moved = self.width * (m * k + k * n + m * n) / self._stream
        return groups * max(busy, moved)

    def attention(self, queries: float, keys: float, dim: float, longest: float) -> tuple[float, float]:
        """Returns the seconds of fused attention, forward and backward.

        Args:
            queries: Number of query tokens.
            keys: Average number of keys that a query sees.
            dim: Number of heads times head size on this rank.
            longest: Number of keys in a kernel call, which decides the kernel's efficiency.
        """
        kernels = self.hardware.kernels
        peak = self.hardware.peak("bf16" if self.dtype == "fp8" else self.dtype)
        rate = peak * kernels.attention_efficiency * longest / (longest + kernels.attention_half_length)
        product = 2 * queries * keys * dim / rate
        return 2 * product, 5 * product / kernels.attention_backward_ratio

    def stream(self, moved_bytes: float) -> float:
        """Returns the seconds of element-wise work that reads and writes ``moved_bytes`` in total."""
        return moved_bytes / self._stream

    @property
    def _stream(self) -> float:
        return self.hardware.memory_bandwidth * self.hardware.kernels.memory_efficiency
