# SPDX-License-Identifier: Apache-2.0
"""Optimizers for ranks whose pipeline stages are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_moefold.models import MoECausalLM
from lightning_moefold.parallel.network.runner import runner_of


@contextmanager
def spare_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a model whose stages here are all frozen has a parameter without elements: optimizers refuse to have none."""
    frozen = [m for m in modules if _in_stages(m) and not any(p.requires_grad for p in m.parameters())]
    for model in frozen:
        device = next((p.device for p in model.parameters()), None)
        model.register_parameter("pipeline_spare", nn.Parameter(torch.empty(0, device=device)))
    try:
        yield
    finally:
        for model in frozen:
            del model.pipeline_spare


def _in_stages(module: nn.Module) -> bool:
    runner = module if isinstance(module, MoECausalLM) else runner_of(module)
    return runner is not None and runner.pipeline is not None
