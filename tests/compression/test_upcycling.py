# SPDX-License-Identifier: Apache-2.0
"""An upcycled model computes what the dense one does, in Hugging Face's code and in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_moefold import MoECausalLM
from lightning_moefold.compression.upcycling import Upcycling, mixture_config, upcycle
from lightning_moefold.errors import CheckpointError, ConfigError, InputError
from lightning_moefold.models import MoEConfig
from lightning_moefold.testing import hf_reference
from tests.quick import quick

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def dense_checkpoint(path: Path, family: str, **overrides: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **overrides}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm" in name))
    model.double().save_pretrained(path)  # so that a factor of 3 is not rounded
    return path


CASES = [
    ("llama", {}, Upcycling(4, 2)),
    ("llama", {"tie_word_embeddings": True}, Upcycling(8, 4, 2)),
    ("mistral", {"sliding_window": 5, "head_dim": 12}, Upcycling(9, 3, 3)),
    ("qwen2", {}, Upcycling(8, 4, 4, router_std=0.5)),
    ("qwen2", {"tie_word_embeddings": True}, Upcycling(4, 1)),
]


@pytest.mark.parametrize(("family", "overrides", "how"), quick(CASES, CASES[2]))
def test_function_is_that_of_the_dense_model(tmp_path: Path, family: str, overrides: Any, how: Upcycling) -> None:
    dense = dense_checkpoint(tmp_path / "dense", family, **overrides)
    config = upcycle(dense, tmp_path / "moe", how)
    assert (config.num_experts, config.num_experts_per_tok) == (how.experts, how.top_k)
    token_NS = torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(1))
    expected, mixture = hf_reference(dense), hf_reference(tmp_path / "moe")
    with torch.no_grad():
        logits = expected(token_NS).logits
        torch.testing.assert_close(mixture(token_NS).logits, logits, rtol=0, atol=1e-11)
        ours = MoECausalLM.from_pretrained(tmp_path / "moe", torch.float64, router_aux_loss_coef=0.0)
        torch.testing.assert_close(ours(token_NS).logits, logits, rtol=0, atol=1e-11)


def test_noise_and_seed_change_experts_and_routers_alone(tmp_path: Path) -> None:
    dense = dense_checkpoint(tmp_path / "dense", "llama")
    models = []
    for number, how in enumerate((Upcycling(4, 2, noise=0.1), Upcycling(4, 2, noise=0.1, seed=1), Upcycling(4, 2))):
        upcycle(dense, tmp_path / str(number), how)
        models.append(
            dict(MoECausalLM.from_pretrained(tmp_path / str(number), router_aux_loss_coef=0.0).named_parameters())
        )
    noisy, other, exact = models
    for name, parameter in exact.items():
        changed = ".experts." in name
        assert torch.equal(noisy[name], parameter) != changed
        assert torch.equal(noisy[name], other[name]) != (changed or ".mlp.gate." in name)
    name = "model.layers.1.mlp.experts.up_proj"
    share = (noisy[name] - exact[name]).std() / exact[name].std()
    assert 0.08 < share < 0.12


def test_what_would_change_the_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--top-k 3 is not a multiple of --granularity 2.*use 4"):
        Upcycling(8, 3, 2)
    with pytest.raises(InputError, match="--experts 7 is not a multiple of --granularity 2.*use 8"):
        Upcycling(7, 2, 2)
    with pytest.raises(InputError, match="--top-k 9 is more than --experts 8"):
        Upcycling(8, 9)
    with pytest.raises(InputError, match="--noise nan must be 0 or more"):
        Upcycling(noise=float("nan"))
    dense = dense_checkpoint(tmp_path / "dense", "qwen2")
    raw = json.loads((dense / "config.json").read_text())
    with pytest.raises(ConfigError, match="intermediate_size=48 does not divide by --granularity 5"):
        mixture_config(raw, Upcycling(5, 5, 5))
    with pytest.raises(ConfigError, match="use_sliding_window=true names other layers"):
        mixture_config(raw | {"use_sliding_window": True}, Upcycling())
    with pytest.raises(ConfigError, match="model_type='gpt2' cannot be upcycled"):
        mixture_config(raw | {"model_type": "gpt2"}, Upcycling())
    mistral = raw | {"model_type": "mistral", "sliding_window": 8}
    for kinds, window in ((["full_attention"] * 2, None), (["sliding_attention"] * 2, 8)):
        assert mixture_config(mistral | {"layer_types": kinds}, Upcycling())["sliding_window"] == window
    with pytest.raises(ConfigError, match="layer_types gives layers different attention"):
        mixture_config(mistral | {"layer_types": ["sliding_attention", "full_attention"]}, Upcycling())
    with pytest.raises(ConfigError, match="mlp_bias=true has no counterpart"):
        mixture_config(raw | {"model_type": "llama", "mlp_bias": True}, Upcycling())
    (dense / "config.json").write_text(json.dumps(raw | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="the configuration makes it"):
        upcycle(dense, tmp_path / "moe")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_fields_that_are_left_out_mean_what_they_mean_in_the_dense_model(family: str) -> None:
    raw = {"model_type": family, **TINY, "num_attention_heads": 32, "head_dim": 4}
    linear = {"rope_type": "linear", "factor": 4.0}
    cases: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["num_key_value_heads"], {}),
        (["num_hidden_layers"], {}),
        *(([], {"rope_parameters": rotary}) for rotary in (None, {}, linear, linear | {"rope_theta": 5e5})),
        ([], {"rope_scaling": linear}),
    ]
    for left_out, given in cases:
        case = {name: value for name, value in raw.items() if name not in left_out} | given
        # transformers changes the dictionaries that it is given
        dense = AutoConfig.for_model(**json.loads(json.dumps(case)))
        config = MoEConfig.from_hf(mixture_config(case, Upcycling()))
        rotary = dense.rope_parameters
        assert (config.rope_theta, config.rope_scaling_factor) == (rotary["rope_theta"], rotary.get("factor", 1.0)), (
            case
        )
        assert config.num_key_value_heads == dense.num_key_value_heads
        window = dense.sliding_window if family == "mistral" else None
        assert config.sliding_windows == (window,) * dense.num_hidden_layers


def test_a_damaged_configuration_or_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    for width, said in (({}, "None"), ({"intermediate_size": "48"}, "'48'"), ({"intermediate_size": 0}, "0")):
        case = {"model_type": "llama", **{k: v for k, v in TINY.items() if k != "intermediate_size"}, **width}
        with pytest.raises(ConfigError, match=f"intermediate_size={said} must be a positive integer"):
            mixture_config(case, Upcycling())
    with pytest.raises(ConfigError, match="no field 'num_attention_heads'|num_key_value_heads=None"):
        MoEConfig.from_hf(mixture_config({"model_type": "llama", "intermediate_size": 48}, Upcycling()))
    dense = dense_checkpoint(tmp_path / "dense", "llama", tie_word_embeddings=True)
    file = dense / "model.safetensors"
    tensors = load_file(file)
    for extra, said in (
        ({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1e-3}, "a head of its own"),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, "frequencies are not those of rope_theta"),
    ):
        save_file(tensors | extra, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            upcycle(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
