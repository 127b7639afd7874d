# SPDX-License-Identifier: Apache-2.0
"""Which decoder layers are compiled, how much of each is one graph, and whether the machine can compile at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.fsdp import FSDPModule

from lightning_moefold.kernels.availability import has_c_compiler
from lightning_moefold.modules.decoder import DecoderLayer
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.routers import Router

#: The back end of ``torch.compile`` that ``compile=True`` uses.
COMPILER = "inductor"


def missing_tool(device: torch.device) -> str | None:
    """What the compiler's back end needs on this machine and does not find; None where nothing is missing.

    On CPU, C++ is generated and compiled; on CUDA, Triton builds a launcher in C.
    """
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "Triton"
        return None if has_c_compiler() else "a C compiler (gcc or clang, or the variable CC)"
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(name) else f"a C++ compiler ({name}, or the variable CXX)"


def has_compiler(device: torch.device, everywhere: Callable[[bool], bool]) -> bool:
    """Whether every machine can compile; one warning where one cannot. Collective, as ``everywhere`` asks all ranks."""
    missing = missing_tool(device)
    if everywhere(missing is None):
        return True
    where = f"{missing}, which this machine does not have" if missing else "a tool that another machine does not have"
    rank_zero_warn(f"compile=True needs {where}; install it. Layers run as they are, not compiled.")
    return False


def break_reasons(layer: DecoderLayer, mixed_dtype: torch.dtype | None) -> list[str]:
    """Where compiled code of this layer stops and goes on, besides batches whose attention needs a mask.

    Args:
        layer: The layer.
        mixed_dtype: The dtype in which it computes, if that is not the dtype of its parameters.
    """
    reasons = []
    fold, mlp = layer.fold, layer.mlp
    if fold.tp * fold.cp > 1 or (isinstance(mlp, MoELayer) and mlp.dispatcher.etp_ep.size > 1):
        reasons.append("collectives")
    if any(isinstance(m, FSDPModule) for m in layer.modules() if m is not layer):
        reasons.append("the hooks of FSDP2 around experts and routers")
    if isinstance(mlp, MoELayer):
        weight = next(mlp.experts.parameters())
        compute = torch.empty(0, dtype=mixed_dtype or weight.dtype, device=weight.device)
        if not mlp.experts.compiles(compute):
            reasons.append("experts that are not computed by grouped_mm in bfloat16")
        router = next(kind for kind in type(mlp.gate).__mro__ if not issubclass(kind, FSDPModule))
        if router is not Router:
            reasons.append(f"the router {router.__name__}")
    return reasons


def _allow_graphs(layers: int) -> None:
    """Lets each layer have graphs of its own: noise of routers and dropout depend on a layer's number, a constant of its graphs.

    A layer has two, for the first length and for all lengths, each with and without gradients. torch's own limit is 8 for all
    layers of a process together, those of earlier models included, and more is an error where a layer must be one graph.
    """
    torch._dynamo.config.recompile_limit += 4 * layers
    torch._dynamo.config.accumulated_recompile_limit += 4 * layers


def compile_layers(layers: Sequence[DecoderLayer], backend: str, mixed_dtype: torch.dtype | None) -> str:
    """Compiles decoder layers of this rank in place, each as one graph where nothing stands against it.

    Args:
        layers: The layers.
        backend: The back end of ``torch.compile``.
        mixed_dtype: The dtype in which they compute, if that is not the dtype of their parameters.

    Returns:
        A sentence on what was compiled, and where graphs break.
    """
    _allow_graphs(len(layers))
    whole, reasons = 0, dict[str, None]()
    for layer in layers:
        found = break_reasons(layer, mixed_dtype)
        layer.compile(backend=backend, fullgraph=not found)
        whole += not found
        reasons |= dict.fromkeys(found)
    text = f"compile=True: {whole} of {len(layers)} decoder layers of this rank are one graph each"
    return f"{text}; the others break theirs at {', '.join(reasons)}." if reasons else f"{text}."
