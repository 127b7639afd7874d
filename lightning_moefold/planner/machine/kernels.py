# SPDX-License-Identifier: Apache-2.0
"""What a matrix product, attention and element-wise work cost on one rank. Pure Python.

A product of sides m, n, k reaches ``e * m/(m+h) * n/(n+h) * k/(k+h)`` of the peak: tiles at the borders are part empty,
and a tile's start and end are paid once per k. It is never faster than its operands come from memory. So the many small
products of fine-grained experts, and every product that tp or etp cuts, are slower than their FLOPs say.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_moefold.planner.machine.hardware import Hardware


@dataclass(frozen=True)
class Compute:
    """Kernel times on a machine, in seconds.

    Args:
        hardware: The machine.
        dtype: Of matrix products.
        width: Bytes of an operand.
    """

    hardware: Hardware
    dtype: str
    width: int

    def gemm(self, m: float, n: float, k: float, groups: int = 1) -> float:
        """``groups`` products of [m, k] and [k, n]. The products of backward have the same sides in another order."""
        if min(m, n, k, groups) <= 0:
            return 0.0
        kernels = self.hardware.kernels
        # What a tile costs besides its products does not shrink with the products: faster units need longer sides.
        half = kernels.gemm_half_size
        if self.dtype == "fp8":
            half *= self.hardware.peak("fp8") / self.hardware.peak("bf16")
        efficiency = kernels.gemm_efficiency * m / (m + half) * n / (n + half) * k / (k + half)
        busy = 2 * m * n * k / (self.hardware.peak(self.dtype) * efficiency)
        moved = self.width * (m * k + k * n + m * n) / self._stream
        return groups * max(busy, moved)

    def attention(self, queries: float, keys: float, dim: float, longest: float) -> tuple[float, float]:
        """Forward and backward of fused attention.

        Args:
            queries: Tokens.
            keys: Keys that a query sees, on average.
            dim: Heads times head size on this rank.
            longest: Keys in a kernel call, which decides how well it is filled.
        """
        kernels = self.hardware.kernels
        dtype = "bf16" if self.dtype == "fp8" else self.dtype
        rate = (
            self.hardware.peak(dtype)
            * kernels.attention_efficiency
            * longest
            / (longest + kernels.attention_half_length)
        )
        product = 2 * queries * keys * dim / rate
        return 2 * product, 5 * product / kernels.attention_backward_ratio

    def stream(self, moved_bytes: float) -> float:
        """Element-wise work that reads and writes ``moved_bytes``."""
        return moved_bytes / self._stream

    @property
    def _stream(self) -> float:
        return self.hardware.memory_bandwidth * self.hardware.kernels.memory_efficiency
