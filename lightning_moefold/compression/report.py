# SPDX-License-Identifier: Apache-2.0
"""An analysis as a table. Pure.

Legend: L MoE layers, E experts, F expert width, S width of the shared expert, N channels of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.pruning import Pruned, lost_energy
from lightning_moefold.compression.ranking import keep_by_expert, keep_by_layer

#: Ratios of the table.
RATIOS = (0.2, 0.4, 0.6)


def channels_of(energies: Energies, row: int) -> NDArray[np.float64]:
    """Returns the energies of all channels of a layer, the largest first, ``[N]``."""
    every = np.concatenate([energies.energy[row].ravel(), energies.shared_energy[row]])
    return np.sort(every)[::-1]


def redundancy(energies: Energies, row: int) -> float:
    """Returns the share of a layer's channels that together hold at most 1% of its energy."""
    rising = np.cumsum(channels_of(energies, row)[::-1])
    return float((rising <= 0.01 * rising[-1]).mean()) if rising[-1] else 1.0


def idle_experts(energies: Energies, row: int, ratio: float) -> list[int]:
    """Returns the experts of which a ratio leaves less than a tenth of their channels: candidates to go altogether."""
    kept = keep_by_layer(energies.energy[row], energies.shared_energy[row], ratio)
    return np.flatnonzero(kept.widths_E < 0.1 * energies.energy.shape[2]).tolist()


def analysis_table(energies: Energies) -> str:
    """Returns a table with one row per layer."""
    head = ["layer", "max/mean load", "channels with 1% of energy", *(f"lost at {r:.0%}" for r in RATIOS)]
    head += ["uniform at 40%", "experts that may go at 40%"]
    rows = [head]
    for row, layer in enumerate(energies.layers.tolist()):
        load_E = energies.load[row]
        routed_EF, shared_S = energies.energy[row], energies.shared_energy[row]
        lost = [lost_energy(energies, row, keep_by_layer(routed_EF, shared_S, ratio)) for ratio in RATIOS]
        widths = (round((1 - 0.4) * size) for size in (routed_EF.shape[1], len(shared_S)))
        uniform = lost_energy(energies, row, keep_by_expert(routed_EF, shared_S, *widths))
        idle = idle_experts(energies, row, 0.4)
        shown = ", ".join(map(str, idle[:8])) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
        rows.append(
            [
                str(layer), f"{load_E.max() / max(load_E.mean(), 1e-300):.2f}", f"{redundancy(energies, row):.1%}",
                *(f"{share:.2%}" for share in lost), f"{uniform:.2%}", shown or "none",
            ]
        )  # fmt: skip
    made = f"{energies.tokens:,} tokens in {energies.rows} rows, alpha {energies.alpha:g}, {energies.dtype}, {energies.fold}"
    which = "dense model" if np.isnan(energies.ratio) else f"earlier layers pruned at {energies.ratio:g}"
    return f"{which}; {made}\n\n" + table(rows)


def pruned_table(pruned: Pruned, energies: Energies) -> str:
    """Returns a table of what pruning took from each layer."""
    rows = [["layer", "channels kept", "narrowest", "widest", "experts gone", "energy lost"]]
    for layer, kept in pruned.kept.items():
        widths_E = kept.widths_E
        rows.append(
            [
                str(layer), f"{kept.share:.1%}", str(widths_E.min()), str(widths_E.max()), str(int((widths_E == 0).sum())),
                f"{pruned.lost[layer]:.2%}",
            ]
        )  # fmt: skip
    before, after = pruned.parameters
    flops = pruned.flops
    zeroed = "\nzeroed: the files and their FLOPs stay as before; --form packed has these numbers"
    note = zeroed if pruned.form == "zeroed" else ""
    return table(rows) + (
        f"\n\n{before:,} parameters before, {after:,} after ({after / before:.1%})"
        f"\n{flops[0]:,.0f} FLOPs of experts for a token in forward, {flops[1]:,.0f} after ({flops[1] / flops[0]:.1%}){note}"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lays out rows of text in columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
