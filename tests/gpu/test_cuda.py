# SPDX-License-Identifier: Apache-2.0
"""What CPU ranks cannot show: the grouped kernel, attention with masks on CUDA, a training run on one device.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.callbacks.memory import read_memory
from lightning_moefold.modules import experts
from lightning_moefold.testing import assert_close_by_name, make_batches, make_checkpoint, reference_run
from lightning_moefold.testing.pieces import assemble
from tests.exactness import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[5, 0, 11, 16], [0, 0, 32, 0], [8, 8, 8, 8]])
def test_grouped_kernel_is_the_loop(dtype: torch.dtype, counts: list[int]) -> None:
    """One kernel for all experts gives what one expert after the other gives, gradients included."""
    torch.manual_seed(0)
    layer = experts.Experts(64, len(counts), 32).to("cuda", dtype)
    rows = torch.randn(sum(counts), 64, device="cuda", dtype=dtype)
    counts_L = torch.tensor(counts, device="cuda")
    results = []
    for grouped in (True, False):
        x = rows.clone().requires_grad_()
        layer.zero_grad()
        weights = (layer.gate_proj, layer.up_proj, layer.down_proj)
        if grouped:
            y = experts._grouped(x, counts_L, layer.activation, *weights)
        else:
            y = experts._ExpertByExpert.apply(x, counts, layer.activation, *weights)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(w.grad.clone() for w in weights)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


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
