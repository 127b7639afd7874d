# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's format, both ways, and what is merged from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moefold import LoRA, MoECausalLM
from lightning_moefold.cli.main import main
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.testing import hf_reference, make_checkpoint
from lightning_moefold.testing.oracle import _split
from tests.adapters.made import make_adapter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "experts"]
SHARED = ["gate_proj", "up_proj", "down_proj", "shared_expert_gate"]
TOKENS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "qwen3_moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "qwen2_moe", "qwen2_moe", dtype=torch.bfloat16)


def adapted(base: Path, lora: LoRA | Path, dtype: torch.dtype = torch.float32) -> MoECausalLM:
    """A model whose adapter has values everywhere."""
    model = MoECausalLM.from_pretrained(base, dtype=dtype)
    model.add_adapter(lora) if isinstance(lora, LoRA) else model.load_adapter(lora)
    if isinstance(lora, LoRA):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in model.adapter.shapes:
                parameter = model.get_parameter(name)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """PEFT's A and B by our names."""
    named = [(n, p) for n, p in model.named_parameters() if ".lora_" in n]
    return {new: t for n, p in named for new, t in _split(n, p.detach(), model.num_experts)}


@torch.no_grad()
def test_ours_in_peft(base: Path, tmp_path: Path) -> None:
    targets = TARGETS + SHARED if base.name == "qwen2_moe" else TARGETS
    ours = adapted(base, LoRA(rank=4, alpha=6, targets=targets, expert_rank=3), torch.float64)
    ours.save_adapter(tmp_path / "adapter")
    theirs = hf_reference(base)
    logits = theirs(input_ids=TOKENS).logits
    PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    held = peft_tensors(theirs)
    assert held.keys() == set(ours.adapter.shapes)
    assert all(bool((held[name] == ours.get_parameter(name)).all()) for name in held)
    with_adapter = theirs(input_ids=TOKENS).logits
    assert float((with_adapter - logits).abs().max()) > 1e-2
    torch.testing.assert_close(ours(TOKENS).logits, with_adapter, rtol=1e-9, atol=1e-9)
    again = adapted(base, tmp_path / "adapter", torch.float64)  # and back
    assert again.adapter.lora == LoRA(4, 6.0, again.adapter.lora.targets, 3)
    assert all(bool((again.get_parameter(n) == p).all()) for n, p in ours.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"target_parameters": None, "rank_pattern": {}}], ids=str)
def test_theirs_in_ours(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    path = make_adapter(tmp_path / "adapter", base, **fields)
    ours, theirs = adapted(base, path, torch.float64), hf_reference(base)
    PeftModel.from_pretrained(theirs, path)
    held = peft_tensors(theirs)
    assert held.keys() == set(ours.adapter.shapes)
    assert all(bool((held[name] == ours.get_parameter(name)).all()) for name in held)
    torch.testing.assert_close(ours(TOKENS).logits, theirs(input_ids=TOKENS).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_dora_both_ways_and_merged(base: Path, tmp_path: Path) -> None:
    """Rows of trained lengths: logits as PEFT's, ours loaded by PEFT and PEFT's by us, and the sum with its lengths written."""
    gate = ["shared_expert_gate"] if base.name == "qwen2_moe" else []
    fields = {"use_dora": True, "target_parameters": None, "rank_pattern": {}, "use_rslora": True}
    path = make_adapter(tmp_path / "theirs", base, **fields)
    ours, theirs = adapted(base, path, torch.float64), hf_reference(base)
    PeftModel.from_pretrained(theirs, path)
    held = peft_tensors(theirs)
    assert held.keys() == set(ours.adapter.shapes)
    assert sum(name.endswith("lora_magnitude") for name in held) >= 8
    expected = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(ours(TOKENS).logits, expected, rtol=1e-9, atol=1e-9)
    ours.save_adapter(tmp_path / "ours")
    plain = hf_reference(base)
    PeftModel.from_pretrained(plain, tmp_path / "ours")
    torch.testing.assert_close(plain(input_ids=TOKENS).logits, expected, rtol=1e-9, atol=1e-9)
    command = [
        "merge",
        "--checkpoint",
        str(base),
        "--adapter",
        str(tmp_path / "ours"),
        "--output",
        str(tmp_path / "merged"),
    ]
    assert main([*command, "--dtype", "float32"]) == 0
    merged = MoECausalLM.from_pretrained(tmp_path / "merged", torch.float64)
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    # A new one begins as the model without it.
    fresh = MoECausalLM.from_pretrained(base, torch.float64)
    logits = fresh(TOKENS).logits
    fresh.add_adapter(LoRA(use_dora=True, targets=["q_proj", "o_proj", *gate]))
    torch.testing.assert_close(fresh(TOKENS).logits, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (LoRA(use_dora=True, targets=["q_proj", "experts"]), "does not go with the target 'experts'"),
        (LoRA(use_dora=True, targets=["gate"]), "does not go with the target 'gate'"),
        (LoRA(use_dora=True, targets=["down_proj"]), "which PEFT adapts as a parameter"),
        (LoRA(dropout=0.1, targets=["gate"]), "a router's adapter has none"),
    ],
)
def test_what_only_modules_can_have(qwen: Path, lora: LoRA, says: str) -> None:
    with pytest.raises(InputError, match=says):
        MoECausalLM.from_pretrained(qwen).add_adapter(lora)
    for dropout in (-0.1, 1.0):
        with pytest.raises(InputError, match="at least 0 and less than 1"):
            LoRA(dropout=dropout)


@torch.no_grad()
def test_an_adapter_for_each_matrix_of_an_expert(base: Path, tmp_path: Path) -> None:
    """As files for older versions are: gate and up have an A each, so what they share has twice the rank."""
    mixtral = base.name == "mixtral"
    block, names = (
        ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    generator, stored = torch.Generator().manual_seed(2), {}
    for expert in range(4):
        for name, (out, into) in zip(names, ((16, 32), (16, 32), (32, 16)), strict=True):
            key = f"base_model.model.model.layers.0.{block}.experts.{expert}.{name}"
            stored[f"{key}.lora_A.weight"] = torch.randn(3, into, generator=generator)
            stored[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=generator)
    (tmp_path / "adapter").mkdir()
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(names), "layers_to_transform": [0]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    ours = adapted(base, tmp_path / "adapter", torch.float64)
    assert ours.model.layers["0"].mlp.experts.gate_up_lora_A.shape == (4, 6, 32)
    plain = hf_reference(base)
    experts = plain.model.layers[0].mlp.experts
    for expert in range(4):
        parts = [f"base_model.model.model.layers.0.{block}.experts.{expert}.{name}" for name in names]
        gate, up, down = (
            2 * stored[f"{p}.lora_B.weight"].double() @ stored[f"{p}.lora_A.weight"].double() for p in parts
        )
        experts.gate_up_proj[expert] += torch.cat([gate, up])
        experts.down_proj[expert] += down
    torch.testing.assert_close(ours(TOKENS).logits, plain(input_ids=TOKENS).logits, rtol=1e-9, atol=1e-9)
    ours.save_adapter(tmp_path / "fused")
    theirs = hf_reference(base)
    PeftModel.from_pretrained(theirs, tmp_path / "fused")
    torch.testing.assert_close(theirs(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_files_for_older_readers(base: Path, tmp_path: Path) -> None:
    ours = adapted(base, LoRA(rank=4, alpha=6, targets=TARGETS, expert_rank=3), torch.float64)
    ours.save_adapter(tmp_path / "adapter", separate_experts=True)
    logits = ours(TOKENS).logits
    again = adapted(base, tmp_path / "adapter", torch.float64)
    assert again.adapter.lora.separate_gate_up
    torch.testing.assert_close(again(TOKENS).logits, logits, rtol=1e-9, atol=1e-9)
    if base.name != "qwen2_moe":  # PEFT 0.21 converts older files of the other two families
        theirs = hf_reference(base)
        PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="leave separate_experts out"):
        again.save_adapter(tmp_path / "again", separate_experts=True)


@torch.no_grad()
def test_merging_is_exact_to_the_rounding(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_adapter(tmp_path / "adapter", qwen)
    arguments = ["--checkpoint", str(qwen), "--adapter", str(path), "--output", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    assert "merged" in capsys.readouterr().out
    merged, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", qwen))
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in plain.items()}
    theirs = hf_reference(qwen)
    exact = PeftModel.from_pretrained(theirs, path).merge_and_unload()
    changed = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == set(TARGETS + SHARED) - {"experts"}
    for name, tensor in exact.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(merged[name], tensor.bfloat16()), name
    gate_up = exact.model.layers[1].mlp.experts.gate_up_proj
    for expert in range(4):
        pair = [merged[f"model.layers.1.mlp.experts.{expert}.{half}_proj.weight"] for half in ("gate", "up")]
        assert torch.equal(torch.cat(pair), gate_up[expert].bfloat16())


def test_save_pretrained_merges(base: Path, tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "adapter", base)
    adapted(base, path).save_pretrained(tmp_path / "whole")
    main(["merge", "--checkpoint", str(base), "--adapter", str(path), "--output", str(tmp_path / "merged")])
    whole, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "merged"))
    assert whole.keys() == merged.keys()
    assert all(torch.equal(whole[name], merged[name]) for name in whole)


def test_a_new_adapter_changes_nothing_yet(base: Path) -> None:
    plain = MoECausalLM.from_pretrained(base, router={"bias_update_rate": 0.1})
    names = [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        logits = plain.train()(TOKENS).logits
        plain.add_adapter({"rank": 4, "targets": TARGETS})
        assert torch.equal(plain(TOKENS).logits, logits)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == set(plain.adapter.shapes)
    assert [n for n, _ in plain.named_parameters() if n in names] == names
    assert not any(layer.gate.learns_bias for layer in plain.moe_layers().values())
    other, same = (MoECausalLM.from_pretrained(base) for _ in range(2))
    other.add_adapter(LoRA(rank=4, targets=TARGETS, seed=1, update_expert_bias=True))
    same.add_adapter(LoRA(rank=4, targets=["experts"]))
    for name in same.adapter.shapes:
        assert torch.equal(same.get_parameter(name), plain.get_parameter(name))
        assert name.endswith("lora_B") or not torch.equal(other.get_parameter(name), plain.get_parameter(name))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"targets": ["w1"]}, "targets can be .*experts.*q_proj"),
        ({"targets": []}, "must be a list"),
        ({"targets": ["lm_head"]}, "can have no adapter"),
        ({"rank": 0}, "must be positive"),
        ({"rnak": 4}, "no field 'rnak'"),
        ("nowhere", "load_adapter takes a directory"),
    ],
    ids=str,
)
def test_what_cannot_be_added(qwen: Path, given: Any, words: str) -> None:
    model = MoECausalLM.from_pretrained(qwen)
    with pytest.raises(InputError, match=words):
        model.add_adapter(given)
    with pytest.raises(InputError, match="holds no adapter"):
        model.load_adapter("nowhere")
    model.add_adapter({"targets": ["q_proj"]})
    with pytest.raises(InputError, match="has an adapter already"):
        model.add_adapter({"targets": ["q_proj"]})


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", "mixtral", tie_word_embeddings=True)
    with pytest.raises(InputError, match="tied to the embedding"):
        MoECausalLM.from_pretrained(tied).add_adapter({"targets": ["lm_head"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"r": 8}, "has shape"),
        ({"alpha_pattern": {"q_proj": 1}}, "several ranks or scales"),
        ({"alpha_pattern": {"experts.down_proj": 1}}, "another scale"),
    ],
    ids=str,
)
def test_files_that_are_refused(qwen: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = make_adapter(tmp_path / "adapter", qwen)
    config = json.loads((path / "adapter_config.json").read_text()) | change
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        MoECausalLM.from_pretrained(qwen).load_adapter(path)


def test_dropout_of_experts_changes_nothing_but_training_which_is_refused(qwen: Path, tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "adapter", qwen)
    logits = adapted(qwen, path)(TOKENS).logits
    config = json.loads((path / "adapter_config.json").read_text()) | {"lora_dropout": 0.1}
    (path / "adapter_config.json").write_text(json.dumps(config))
    model = adapted(qwen, path).eval()
    assert torch.equal(model(TOKENS).logits, logits)
    with pytest.raises(InputError, match="lora_dropout=0.1"):
        model.train()(TOKENS, labels=TOKENS)


def test_an_adapter_of_another_model(qwen: Path, tmp_path: Path) -> None:
    for fields in ({"num_hidden_layers": 3}, {"num_experts": 8}):
        other = make_checkpoint(tmp_path / str(fields), "qwen2_moe", **fields)
        path = make_adapter(tmp_path / f"{fields} adapter", other)
        with pytest.raises(CheckpointError, match="give the adapter of this model"):
            MoECausalLM.from_pretrained(qwen).load_adapter(path)
