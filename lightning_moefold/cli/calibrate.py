# SPDX-License-Identifier: Apache-2.0
"""``moefold calibrate``: arguments and printing."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_moefold.planner.machine.calibrate import DISTURBED, calibrate, fit_products


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold calibrate``."""
    parser.add_argument("--output", required=True, metavar="FILE.toml", help="where to write the hardware file")
    parser.add_argument(
        "--ranks", type=int, default=2, metavar="N", help="processes that measure together (default: 2)"
    )
    parser.add_argument("--name", help="of the hardware (default: the name of the file)")
    parser.add_argument("--cpu", action="store_true", help="measure CPU ranks even where there are GPUs")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold calibrate``."""
    path = Path(arguments.output)
    hardware, measured = calibrate(arguments.ranks, arguments.name or path.stem, False if arguments.cpu else None)
    _, _, error = fit_products(measured.products)
    path.write_text(hardware.to_toml())
    dtype, rate = next(iter(hardware.peak_flops.items()))
    kernels = hardware.kernels
    half = f"half size {kernels.gemm_half_size:.0f}, fit within {error:.0%}"
    print(f"matrix products: {rate / 1e9:.1f} GFLOP/s {dtype}, {half}")
    print(f"memory {hardware.memory_bandwidth / 1e9:.1f} GB/s; all-gather {hardware.intra.bandwidth / 1e9:.2f} GB/s")
    print(f"a collective starts in {kernels.collective * 1e6:.0f} us, a kernel in {kernels.launch * 1e6:.1f} us")
    if error > DISTURBED:
        print("* the products do not follow one curve: something else was running; calibrate again when nothing is")
    print(f"wrote {path}; use it with moefold plan --hardware {path}")
    return 0
