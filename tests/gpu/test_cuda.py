# SPDX-License-Identifier: Apache-2.0
"""What CPU ranks cannot show: the grouped kernel, attention with masks on CUDA, a training run on one device.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.callbacks.memory import read_memory
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.models.generation import Sampling, draw
from lightning_moefold.modules import Attention, DecoderLayer, Experts, MoELayer
from lightning_moefold.modules.base import Linear
from lightning_moefold.modules.experts import kernels
from lightning_moefold.modules.recompute import recomputed
from lightning_moefold.modules.routers import RouterOptions
from lightning_moefold.testing import assert_close_by_name, make_batches, make_checkpoint, reference_run
from lightning_moefold.testing.pieces import assemble
from tests.exactness import runs
from tests.modules.experts.expert_cases import make_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[5, 0, 11, 16], [0, 0, 32, 0], [8, 8, 8, 8]])
@pytest.mark.parametrize("kind", ["in order", "permuted", "often or never"])
def test_grouped_kernel_is_the_loop(dtype: torch.dtype, counts: list[int], kind: str) -> None:
    """One kernel for all experts gives what one expert after the other gives, gradients included."""
    torch.manual_seed(0)
    layer = Experts(64, len(counts), 32).to("cuda", dtype)
    tokens, rows = make_rows(counts, kind, "cuda")
    rows = dataclasses.replace(rows, weight_M=rows.weight_M.float().requires_grad_())
    x = torch.randn(tokens, 64, device="cuda", dtype=dtype, requires_grad=True)
    inputs = [x, rows.weight_M, layer.gate_proj, layer.up_proj, layer.down_proj]
    job = kernels._Job(rows.token_M, rows.distinct, counts, layer.activation)
    results = []
    for y in (
        kernels.gated_experts(x, rows, layer.activation, *inputs[2:], kernel="grouped_mm"),
        kernels.gated_experts(x, rows, layer.activation, *inputs[2:], kernel="loop"),
        kernels._ExpertByExpert.apply(x, rows.weight_M, job, *inputs[2:]),
    ):
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)])
    for *found, exact in zip(*results, strict=True):
        for each in found:
            torch.testing.assert_close(each, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


def _far_apart(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest difference of a tensor, as a share of its largest value."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, exact, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


@pytest.mark.parametrize("recipe", [None, "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
@pytest.mark.parametrize("counts", [[5, 0, 11, 16], [0, 0, 0, 0]])
@pytest.mark.parametrize("kind", ["in order", "permuted", "often or never"])
def test_transformer_engine_is_the_loop(kind: str, counts: list[int], recipe: str | None) -> None:
    """Its grouped products and its permutation in bfloat16, gradients included; in FP8 within what eight bits can do."""
    te = pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    recipes = pytest.importorskip("transformer_engine.common.recipe", exc_type=Exception)
    if recipe == "Float8BlockScaling" and not te.is_fp8_block_scaling_available():
        pytest.skip("this device has no block scaling")
    torch.manual_seed(0)
    layer = Experts(128, len(counts), 256).to("cuda", torch.bfloat16)
    tokens, rows = make_rows(counts, kind, "cuda")
    rows = dataclasses.replace(rows, weight_M=rows.weight_M.float().requires_grad_())
    x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, rows.weight_M, layer.gate_proj, layer.up_proj, layer.down_proj]

    def run(kernel: str) -> list[torch.Tensor]:
        layer.kernel = kernel
        with te.autocast(enabled=recipe is not None, recipe=getattr(recipes, recipe)() if recipe else None):
            y = layer.compute(x, rows, layer.stacks())
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]

    exact = run("loop")
    if recipe == "DelayedScaling":
        run("transformer_engine")  # scales come from the step before
    assert _far_apart(run("transformer_engine"), exact) < (2e-2 if recipe is None else 0.2)


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling"])
def test_transformer_engine_runs_again_in_its_recipe(recipe: str) -> None:
    """A layer that is recomputed in backward, outside of autocast, has the gradients of one that is not."""
    te = pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    recipes = pytest.importorskip("transformer_engine.common.recipe", exc_type=Exception)
    torch.manual_seed(0)
    layer = MoELayer(128, 8, 2, 256).to("cuda", torch.bfloat16)
    assert isinstance(layer.experts, Experts)
    layer.experts.kernel = "transformer_engine"
    x = torch.randn(2, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for run in (layer, lambda x: recomputed(layer, x)):
        layer.experts._engines.clear()  # the same scales at the start
        with te.autocast(recipe=getattr(recipes, recipe)()):
            y = run(x)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    assert _far_apart(*results) < 2e-2


@pytest.mark.parametrize(
    ("dispatch", "waits"),
    [(DispatchConfig(), 1), (DispatchConfig(capacity_factor=1.0, pad_to_capacity=True), 0)],
    ids=["dropless", "padded"],
)
def test_how_often_a_layer_waits_for_transformer_engine(dispatch: DispatchConfig, waits: int) -> None:
    """Once, for the rows of each expert, and never where the host knows them."""
    pytest.importorskip("transformer_engine.pytorch", exc_type=Exception)
    layer = MoELayer(64, 8, 2, 32, dispatch=dispatch).cuda()
    assert isinstance(layer.experts, Experts)
    layer.experts.kernel = "transformer_engine"
    x = torch.randn(2, 16, 64, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # warms up allocator and libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == waits


@pytest.mark.parametrize("noisy", [False, True], ids=["", "jitter and dropout"])
@pytest.mark.parametrize("dispatch", [DispatchConfig(), DispatchConfig(capacity_factor=1.0, pad_to_capacity=True)])
def test_a_layer_never_waits_for_the_device(dispatch: DispatchConfig, noisy: bool) -> None:
    """On one device neither forward nor backward synchronises the host, dropless or padded to capacity.

    In bfloat16, on Hopper and newer: elsewhere PyTorch's grouped product is a loop that asks the device for the counts.
    """
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the grouped product waits for this device")
    router = RouterOptions(input_jitter=0.1 if noisy else 0.0)
    moe = MoELayer(64, 8, 2, 32, router=router, dispatch=dispatch, shared_ffn_hidden_size=32)
    layer = DecoderLayer(64, Attention(64, 4, 2), moe)
    for key, part in enumerate(m for m in layer.modules() if isinstance(m, Linear)):
        if noisy:
            part.adapt(4, 1.0, dropout=0.1, key=key)
            torch.nn.init.normal_(part.lora_A)
            torch.nn.init.normal_(part.lora_B)
    layer = layer.to("cuda", torch.bfloat16)
    x = torch.randn(2, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()  # warms up allocator and libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()  # where the host waits, this raises
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_one_device_equals_one_process(family: str, padding: str, tmp_path: Path) -> None:
    """Losses and gradients of three steps in float64 on the device, against Hugging Face's code on the CPU."""
    path = make_checkpoint(tmp_path / "model", family, num_experts=8)
    batches = make_batches(3, 1, 4, 8, 96, padding=padding)
    spec = {"overrides": {"output_router_logits": True}, "clip": 0.5, "lr": 1e-2}
    expected = reference_run(path, batches, clip=0.5, config_overrides=spec["overrides"])
    record = runs.RankRun()
    module = runs.Case(str(path), record, spec)
    trainer = pl.Trainer(
        accelerator="cuda", devices=1, strategy=MoEFoldStrategy(), precision="64-true", max_epochs=1, gradient_clip_val=0.5,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(runs.BatchList([step[0] for step in batches]), batch_size=None))
    assert torch.allclose(torch.tensor(record.losses), torch.tensor(expected.losses), rtol=1e-9)
    found = {name: tensor.cpu() for name, tensor in assemble([record.grads[0]]).items()}
    assert_close_by_name(found, expected.grads[0], 1e-9, "gradients")


def test_bfloat16_forward_and_backward(tmp_path: Path) -> None:
    """The path that training takes on a GPU (grouped kernel, flash attention) is finite and close to float32."""
    path = make_checkpoint(tmp_path / "model", "qwen2_moe", num_experts=8)
    batch = {k: v.cuda() for k, v in make_batches(1, 1, 4, 64, 96, padding="right")[0][0].items()}
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = MoECausalLM.from_pretrained(path, dtype=dtype).cuda()
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        losses.append(loss.item())
    assert abs(losses[1] / losses[0] - 1) < 0.02


def test_a_deterministic_run_draws_the_same_tokens() -> None:
    logits_BV, uniform_B = torch.randn(4, 5000) * 3, torch.rand(4, dtype=torch.float64)
    sampling = Sampling(top_p=0.8)
    expected = draw(sampling.probabilities(logits_BV), uniform_B)
    torch.use_deterministic_algorithms(True)
    try:
        found = draw(sampling.probabilities(logits_BV.cuda()), uniform_B.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.tolist() == expected.tolist()


def test_memory_of_the_device() -> None:
    """Allocated now, reserved by the allocator, and the most there has been."""
    device = torch.device("cuda")
    block = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    held = read_memory(device)
    assert block.nbytes <= held.allocated <= held.reserved
    assert held.peak >= held.allocated
    del block
    assert read_memory(device).allocated <= held.allocated - (1 << 28)
    assert read_memory(device).peak >= held.allocated
