# SPDX-License-Identifier: Apache-2.0
"""Whether layers of a custom network may be given rows that are cut over cp.

Blocks know where their positions lie; code around them does not. A layer that, say, subtracts the mean over positions would
compute something else on a part of the row, and nothing would look wrong. So before the first call each layer is tried on one
row of noise, whole and cut.

Legend: S positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.base import ParallelRoot
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.parallel.network.row_cut import RowCut, tell_blocks


@torch.no_grad()
def check_positions(layers: Mapping[str, nn.Module], like: Tensor, cut: RowCut, axis: Axis) -> ValueError | None:
    """Tries layers in evaluation mode, on rows like these hidden states ``[rows, S or fewer, ...]``. Collective over a stage.

    Returns:
        What is wrong with a layer, on all ranks of the stage if on one.
    """
    noise = torch.randn((1, cut.true_length, *like.shape[2:]), generator=torch.Generator().manual_seed(0))
    x_1SD = noise.to(like)
    wrong: ValueError | None = None
    for name, layer in layers.items():
        if isinstance(layer, ParallelRoot) or _drops_by_parts(layer):
            continue
        modes = [(m, m.training) for m in layer.modules()]
        blocks = [m for m in layer.modules() if isinstance(m, ParallelRoot)]
        layer.eval()
        try:
            tell_blocks(blocks, None)
            whole = layer(x_1SD.clone())
            tell_blocks(blocks, cut)
            parts = cut.leave(layer(cut.enter(x_1SD)))
            # The median, as rounding may send single tokens to other experts.
            error, size = (whole - parts).double().abs().median(), whole.double().abs().median()
            tolerance = 0.05 if parts.dtype.itemsize < 4 or torch.is_autocast_enabled(like.device.type) else 1e-3
            if not error <= tolerance * size:
                wrong = wrong or InputError(_sentence(name, cut))
        except Exception as failure:
            wrong = wrong or InputError(f"{_sentence(name, cut)} ({type(failure).__name__}: {failure})")
        finally:
            tell_blocks(blocks, cut)
            for module, training in modes:
                module.training = training
    flag = torch.tensor(float(wrong is not None), device=like.device)
    if bool(comm.all_reduce_raw(flag, axis)) and wrong is None:
        wrong = InputError(_sentence("", cut))
    return wrong


def _drops_by_parts(layer: nn.Module) -> bool:
    """Whether experts are asked to serve each rank's part of a row by itself: that is meant to depend on the cut."""
    configs = [m.dispatcher.config for m in layer.modules() if isinstance(m, MoELayer)]
    return any(c.capacity_factor is not None and c.drop_scope == "sub_sequence" for c in configs)


def _sentence(name: str, cut: RowCut) -> str:
    layer = f"layer {name}" if name else "a layer"
    return (
        f"{layer} gives another result on a part of a row than on the whole, so context parallelism cannot cut rows between "
        "embed and head; let nothing but Attention look at other positions there (position embeddings belong into embed), or "
        f"use context_parallel_size=1 instead of {cut.layout.cp.size}."
    )
