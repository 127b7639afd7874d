# SPDX-License-Identifier: Apache-2.0
"""``moefold camera``: which micro-experts of a model matter, and a checkpoint without the others."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np

from lightning_moefold.checkpoint.stores import check_folder
from lightning_moefold.cli.calibrating import add_calibration, calibration_of, run_calibrated
from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.pruning import FORMS, prune, unpack
from lightning_moefold.compression.quantizing import Bits, quantize
from lightning_moefold.compression.ranking import check_ratio, keep_by_layer
from lightning_moefold.compression.report import analysis_table, channels_of, pruned_table, redundancy, table
from lightning_moefold.errors import InputError
from lightning_moefold.plots.energies import write_energy_plot


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold camera analyze`` and ``moefold camera prune``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="analyze | prune | quantize | unpack")
    one = actions.add_parser("analyze", help="compute the energy of every micro-expert")
    add_calibration(one)
    one.add_argument("--output", required=True, type=Path, metavar="FILE.npz", help="energies")
    one.add_argument(
        "--ratio",
        type=float,
        help="prune each layer at this ratio before the next is analysed (dense model if left out)",
    )
    one.add_argument("--alpha", type=float, default=0.9, help="weight of the maximum over tokens against the sum (0.9)")
    one.add_argument("--plot", type=Path, metavar="FILE.png", help="draw energy curves, redundancy and widths")
    two = actions.add_parser("prune", help="write the checkpoint without the micro-experts of least energy")
    three = actions.add_parser("quantize", help="round micro-experts to bits by their energy (fake-quantised)")
    four = actions.add_parser("unpack", help="write a packed checkpoint as a zeroed one, which transformers loads")
    for action in (two, three):
        action.add_argument("--checkpoint", required=True, metavar="DIR", help="the model that was analysed")
        action.add_argument(
            "--energies", required=True, type=Path, metavar="FILE.npz", help="written by camera analyze"
        )
    two.add_argument("--ratio", required=True, type=float, help="share of micro-experts to prune, such as 0.2")
    two.add_argument("--form", choices=FORMS, default="zeroed", help="same shapes, equally narrow, or uneven (zeroed)")
    two.add_argument("--multiple", type=int, default=1, help="of uniform widths, such as 64 for kernels (1)")
    three.add_argument("--bits", default="3,2,1", help="of each group, those with the most energy first (3,2,1)")
    three.add_argument("--shares", default="0.25,0.5,0.25", help="of the channels in each group (0.25,0.5,0.25)")
    three.add_argument("--block", type=int, default=128, help="numbers that share a scale (128)")
    four.add_argument("--checkpoint", required=True, metavar="DIR", help="packed model")
    for action in (two, three, four):
        help_ = "directory to write; one with a model is replaced"
        action.add_argument("--output", required=True, metavar="DIR", help=help_)


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold camera``."""
    if arguments.action == "unpack":
        unpack(arguments.checkpoint, arguments.output)
        print(f"{arguments.output} written: the missing channels of {arguments.checkpoint} are zero")
        return 0
    return {"analyze": _analyze, "prune": _prune, "quantize": _quantize}[arguments.action](arguments)


def _analyze(arguments: argparse.Namespace) -> int:
    if arguments.ratio is not None:
        check_ratio(arguments.ratio)
    if arguments.output.suffix != ".npz":
        raise InputError(f"--output {arguments.output} must end in .npz.")
    check_folder(arguments.output.parent, "energies")
    rows = calibration_of(arguments)
    draft = arguments.output.with_name(f".{arguments.output.name}.partial")
    work = partial(
        analyze, arguments.checkpoint, rows, ratio=arguments.ratio, alpha=arguments.alpha, draft=draft.absolute()
    )
    start = time.perf_counter()
    energies, writes = run_calibrated(work, arguments)
    if writes:
        energies.save(arguments.output)
        print(analysis_table(energies))
        print(f"\n{arguments.output} written in {time.perf_counter() - start:.1f} s")
        if arguments.plot is not None:
            print(f"{draw(energies, arguments.plot, Path(arguments.checkpoint).name)} drawn")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    energies = Energies.load_file(arguments.energies)
    pruned = prune(
        arguments.checkpoint, energies, arguments.output, arguments.ratio, arguments.form, arguments.multiple
    )
    print(pruned_table(pruned, energies))
    print(f"\n{arguments.output} written, {arguments.form}")
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    try:
        bits = tuple(int(part) for part in arguments.bits.split(","))
        shares = tuple(float(part) for part in arguments.shares.split(","))
    except ValueError:
        raise InputError(
            f"--bits {arguments.bits} and --shares {arguments.shares} must be numbers with commas between them."
        ) from None
    how = Bits(bits, shares, arguments.block)
    errors = quantize(arguments.checkpoint, Energies.load_file(arguments.energies), arguments.output, how)
    rows = [["layer", "error of weights", "weighed by energy"]]
    rows += [[str(layer), f"{plain:.2%}", f"{weighed:.2%}"] for layer, (plain, weighed) in errors.items()]
    print(table(rows))
    print(
        f"\n{arguments.output} written, fake-quantised: {how.mean:g} bits a weight of experts, {how.stored:g} with scales, in the "
        "dtype of the checkpoint"
    )
    return 0


def draw(energies: Energies, path: Path, name: str) -> Path:
    """Draws an analysis; widths are those at its ratio, or at 0.4 for the dense model."""
    ratio = 0.4 if np.isnan(energies.ratio) else energies.ratio
    layers = energies.layers.tolist()
    kept = [keep_by_layer(energies.energy[i], energies.shared_energy[i], ratio) for i in range(len(layers))]
    return write_energy_plot(
        path,
        f"Energy of micro-experts: {name}",
        layers,
        np.stack([channels_of(energies, row) for row in range(len(layers))]),
        np.array([redundancy(energies, row) for row in range(len(layers))]),
        np.stack([layer.widths_E for layer in kept]) / energies.energy.shape[2],
        ratio,
    )
