# SPDX-License-Identifier: Apache-2.0
"""Pictures of the energies of micro-experts.

Legend: L MoE layers, E experts, N channels of a layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.plots.style import make_figure, name_layers, save_figure


def write_energy_plot(
    path: Path,
    title: str,
    layers: list[int],
    falling_LN: NDArray[np.float64],
    redundancy_L: NDArray[np.float64],
    width_LE: NDArray[np.float64],
    ratio: float,
) -> Path:
    """Draws the energy curve of each layer, how redundant layers are, and how wide a ratio leaves each expert.

    Args:
        path: PNG to write.
        title: Title of the picture.
        layers: Number of each layer.
        falling_LN: Energies of each layer's channels, the largest first.
        redundancy_L: Share of channels that hold 1 % of the layer's energy.
        width_LE: Share of channels that the ratio leaves each expert.
        ratio: The ratio.

    Returns:
        ``path``.
    """
    from matplotlib import colormaps

    tall = min(7.0, max(1.8, 0.22 * len(layers) + 1))
    figure, panels = make_figure(title, [4.0, 2.4, tall])
    share_N = (np.arange(falling_LN.shape[1]) + 1) / falling_LN.shape[1]
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    step = max(1, len(share_N) // 2000)
    for row, layer in enumerate(layers):
        total = falling_LN[row].sum() or 1.0
        name = f"layer {layer}" if len(layers) <= 8 or layer in (layers[0], layers[-1]) else None
        rest_N = np.clip(1 - np.cumsum(falling_LN[row]) / total, 1e-8, None)
        panels[0].plot(share_N[::step], rest_N[::step], color=colours[row], linewidth=1.3, label=name)
    panels[0].set(yscale="log", ylim=(1e-6, 1), xlim=(0, 1), ylabel="share of energy")
    panels[0].set(xlabel="channels kept, those with the most energy first")
    panels[0].set_title("Energy that pruning the others takes from a layer", loc="left", fontsize=10)
    panels[0].legend(fontsize="small", frameon=False)
    panels[1].bar([str(layer) for layer in layers], 100 * redundancy_L, width=0.7)
    panels[1].set(xlabel="layer", ylabel="% of channels")
    panels[1].set_title("Channels that together hold 1% of a layer's energy", loc="left", fontsize=10)
    if len(layers) > 32:
        panels[1].set_xticks(range(0, len(layers), -(-len(layers) // 16)))
    panels[2].grid(visible=False)
    image = panels[2].imshow(width_LE, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    name_layers(panels[2], layers)
    panels[2].xaxis.get_major_locator().set_params(integer=True)
    panels[2].set(xlabel="expert", ylabel="layer")
    panels[2].set_title(f"Share of each expert's channels that a ratio of {ratio:g} keeps", loc="left", fontsize=10)
    panels[2].figure.colorbar(image, ax=panels[2], label="share kept")
    return save_figure(figure, path)
