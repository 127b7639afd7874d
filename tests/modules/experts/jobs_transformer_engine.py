# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_transformer_engine.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.dispatch import Choices, DispatchConfig, ExpertAxes, TokenDispatcher
from lightning_moefold.dispatch.registry import make_dispatcher
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import Experts
from tests.modules.experts import te_stub

EXPERTS, TOP, HIDDEN, WIDTH = 6, 3, 32, 16


def _walk(experts: Experts, dispatcher: TokenDispatcher, inputs: list[Tensor], expert_TK: Tensor) -> list[Tensor]:
    first, *others = dispatcher.dispatch_preprocess(inputs[0], Choices(inputs[1], expert_TK))
    parcels = [dispatcher.token_dispatch(first), *others]
    returns = experts(parcels, dispatcher)
    y = dispatcher.combine_postprocess(returns, [parcel.plan for parcel in parcels])
    return [y, *torch.autograd.grad(y.square().sum(), [*inputs, *experts.parameters()])]


def both_kernels(configs: list[DispatchConfig]) -> list[tuple[list[list[Tensor]], list[int]]]:
    """For each way of travel: results by the loop, in high precision and in FP8, and local experts of each engine."""
    ranks = dist.get_world_size()
    mesh = FoldedMesh(Fold.parse(f"ep={ranks}", ranks), "cpu")
    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        te_stub.install(patch)
        for config in configs:
            torch.manual_seed(mesh.rank)
            tokens = 5 + 20 * mesh.rank
            inputs = [torch.randn(tokens, HIDDEN, requires_grad=True), torch.rand(tokens, TOP, requires_grad=True)]
            expert_TK = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(tokens)])
            dispatcher = make_dispatcher(config, EXPERTS, TOP, ExpertAxes.of(mesh, config))
            loop = Experts(HIDDEN, EXPERTS // ranks, WIDTH)
            theirs = copy.deepcopy(loop)
            theirs.kernel = "transformer_engine"
            results = [_walk(loop, dispatcher, inputs, expert_TK)]
            for fp8 in (False, True):
                with te_stub.autocast(enabled=fp8):
                    results.append(_walk(theirs, dispatcher, inputs, expert_TK))
            outcomes.append((results, [engine._experts for engine in theirs._engines.values()]))
    return outcomes
