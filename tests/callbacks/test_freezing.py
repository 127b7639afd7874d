# SPDX-License-Identifier: Apache-2.0
"""Hardware FLOPs against the products that torch counts in a real step, with all sorts of parameters frozen.

And with activations that are recomputed.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_moefold import MoECausalLM, MoEConfig
from lightning_moefold.callbacks.freezing import Savings
from lightning_moefold.callbacks.work import WorkModel
from lightning_moefold.modules.recompute_parts import recompute_parts
from lightning_moefold.parallel.apply import tell
from lightning_moefold.parallel.settings import Settings
from lightning_moefold.testing import make_checkpoint
from tests.quick import quick

LENGTH = 8
FROZEN = {
    "nothing": (),
    "everything but the head": ("model.*",),
    "embedding": ("*embed_tokens*",),
    "experts": ("*.mlp.experts.*",),
    "lower layers": ("*embed_tokens*", "model.layers.[01].*"),
    "all but the last layer's experts": ("*embed_tokens*", "*.self_attn.*", "*norm*", "*gate.weight", "*shared*",
                                         "*layers.[01].mlp.*", "lm_head*"),
    "all but norms": ("*_proj*", "*gate.weight", "*shared_expert_gate*", "*embed_tokens*", "lm_head*"),
    "all but routers": ("*_proj*", "*norm*", "*shared*", "*embed_tokens*", "lm_head*"),
    "all but queries and downs": ("*[kvo]_proj*", "*gate_proj*", "*up_proj*", "*norm*", "*gate.weight", "*shared*",
                                  "*embed_tokens*", "lm_head*"),
}  # fmt: skip


def in_place(_: torch.Size, a: torch.Size, b: torch.Size, **__: Any) -> int:
    """FLOPs of ``addmm_``, which torch's counter has forgotten."""
    return 2 * a[0] * a[1] * b[1]


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoECausalLM:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), request.param, num_hidden_layers=3)
    return MoECausalLM.from_pretrained(path, dtype=torch.float64)


@pytest.mark.parametrize(
    "recompute", quick([None, "selective", "full", ["expert_activation"], ["moe"], ["norm", "mlp"]], None)
)
@pytest.mark.parametrize("what", FROZEN)
def test_products_of_a_step(model: MoECausalLM, what: str, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatch(name, pattern) for pattern in FROZEN[what]))
        if not parameter.requires_grad:
            frozen.add(name)
    tell(model, Settings(recompute=recompute))
    # The counter knows nothing of fused attention on a CPU, so attention sees no keys here; see the next test.
    monkeypatch.setattr(MoEConfig, "attended_keys", lambda *_: 0.0)
    config = model.config
    ids = torch.randint(1, config.vocab_size, (3, LENGTH))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        loss = model(ids, labels=ids).loss
        loss.backward()
    model.zero_grad()
    per_token = 3 * config.forward_flops_per_token(LENGTH) - Savings(
        config, frozen, recompute_parts(recompute)
    ).per_token(LENGTH)
    head = 2 * config.vocab_size * config.hidden_size
    head *= 3 - ("lm_head.weight" in frozen) - (what == "everything but the head")
    unlabelled = 3 * head  # the last token of each row has no label, and skips the head
    assert counter.get_total_flops() == per_token * ids.numel() - unlabelled


@pytest.mark.parametrize("recompute", quick([None, "full", ["expert_activation", "attention"]], None, "full"))
@pytest.mark.parametrize(
    "targets", [["q_proj", "o_proj"], ["experts"], ["k_proj", "v_proj", "gate", "experts"]], ids=str
)
def test_products_of_an_adapter(
    model: MoECausalLM, targets: list[str], recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.config
    model = MoECausalLM.from_config(config, dtype=torch.float64)
    model.add_adapter({"rank": 4, "expert_rank": 2, "targets": targets})
    tell(model, Settings(recompute=recompute))
    monkeypatch.setattr(MoEConfig, "attended_keys", lambda *_: 0.0)
    ids = torch.randint(1, config.vocab_size, (3, LENGTH))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        model(ids, labels=ids).loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    savings = Savings(config, frozen, recompute_parts(recompute), model.adapter.shapes)
    per_token = 3 * config.forward_flops_per_token(LENGTH) - savings.per_token(LENGTH)
    unlabelled = 3 * 2 * 2 * config.vocab_size * config.hidden_size  # the last token of each row skips the head
    assert counter.get_total_flops() == per_token * ids.numel() - unlabelled

    # MFU counts the same, and not what is made a second time.
    module = pl.LightningModule()
    module.model = model
    work = WorkModel(module, None, False)
    found = work.count([work.read({"input_ids": ids})])
    assert found.hardware_flops == pytest.approx(per_token * ids.numel())
    once = Savings(config, frozen, frozenset(), model.adapter.shapes).per_token(LENGTH)
    assert found.flops == pytest.approx((3 * config.forward_flops_per_token(LENGTH) - once) * ids.numel())


def test_attention_by_hand(model: MoECausalLM) -> None:
    """Without gradients in two of three layers, four products of scores and values are left out in each."""
    config = model.config
    below = {
        n for n, _ in model.named_parameters() if n.startswith(("model.embed", "model.layers.0.", "model.layers.1."))
    }
    savings = Savings(config, below)
    assert savings.still_attention == [0, 1]
    width = config.num_attention_heads * config.head_dim
    extra = savings.per_token(LENGTH) - savings.weights
    assert extra == pytest.approx(2 * 4 * 2 * width * (LENGTH + 1) / 2)
    again = Savings(config, below, frozenset({"attention"}))  # one layer trains, and makes its two products once more
    assert again.repeated_attention == [2]
    assert again.per_token(LENGTH) - again.weights == pytest.approx((2 * 4 - 2) * 2 * width * (LENGTH + 1) / 2)
