# SPDX-License-Identifier: Apache-2.0
"""A family that a user registers: a made-up variant with fields and tensors of its own names loads, runs and is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moefold import MoECausalLM, MoEConfig
from lightning_moefold.errors import ConfigError, InputError
from lightning_moefold.models import register_family
from lightning_moefold.models.families import _REGISTERED
from lightning_moefold.testing import make_checkpoint

FIELDS = {"n_routed": "num_experts", "expert_dim": "moe_intermediate_size", "experts_each": "num_experts_per_tok"}
NAMES = {"mlp.experts": "moe.e", "mlp.gate": "moe.router", "gate_proj": "w_gate", "model.embed_tokens": "tokens"}
TOKENS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    _REGISTERED.clear()
    yield
    _REGISTERED.clear()


def acme() -> None:
    register_family(
        "acme_moe", "qwen3_moe", fields=FIELDS, constants={"norm_topk_prob": True}, ignored=["slogan"], names=NAMES
    )


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """A Qwen3-MoE, and the same as the made-up family would write it, by hand."""
    base = make_checkpoint(tmp_path / "qwen", "qwen3_moe")
    model = MoECausalLM.from_pretrained(base, output_router_logits=True)
    model.save_pretrained(tmp_path / "plain")
    path = tmp_path / "acme"
    path.mkdir()
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    ours = {known: name for name, known in FIELDS.items()} | {"num_local_experts": "n_routed"}
    config = {ours.get(k, k): v for k, v in raw.items() if k != "norm_topk_prob"}
    config |= {"model_type": "acme_moe", "slogan": "fast", "architectures": ["AcmeForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        name = name.replace("mlp.experts.", "moe.e.").replace("mlp.gate.", "moe.router.")
        renamed[name.replace("gate_proj", "w_gate").replace("model.embed_tokens", "tokens")] = tensor
    assert set(renamed) != set(stored)
    save_file(renamed, path / "model.safetensors")
    return base, path


def test_a_registered_family(paths: tuple[Path, Path], tmp_path: Path) -> None:
    base, path = paths
    with pytest.raises(ConfigError, match="model_type='acme_moe' is not supported"):
        MoECausalLM.from_pretrained(path)
    acme()
    acme()  # the same again changes nothing
    ours = MoECausalLM.from_pretrained(path, output_router_logits=True)
    expected = MoECausalLM.from_pretrained(base, output_router_logits=True)
    assert torch.equal(ours(TOKENS).logits, expected(TOKENS).logits)
    assert MoEConfig.from_pretrained(path, experts_each=1).num_experts_per_tok == 1
    ours.save_pretrained(tmp_path / "again")
    written, config = (load_file(p / "model.safetensors") for p in (tmp_path / "again", path))
    assert written.keys() == config.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in config.items())
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "again"))
    assert after == before
    again = MoECausalLM.from_pretrained(tmp_path / "again", output_router_logits=True)
    assert torch.equal(again(TOKENS).logits, expected(TOKENS).logits)
    drawn = MoECausalLM.from_config(path, seed=1)
    assert torch.equal(drawn.lm_head.weight, MoECausalLM.from_config(base, seed=1).lm_head.weight)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "x", "base": "llama"}, "base='llama' is no known family"),
    ({"model_type": "mixtral", "base": "mixtral"}, "give the name of a new family"),
    ({"model_type": "x", "base": "mixtral", "fields": {"a": "hidden_size", "b": "hidden_size"}}, "two fields of 'x'"),
    ({"model_type": "acme_moe", "base": "mixtral"}, "registered already with another meaning"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_registered(arguments: dict[str, Any], says: str) -> None:
    acme()
    with pytest.raises(InputError, match=says):
        register_family(**arguments)


def test_configurations_that_contradict(paths: tuple[Path, Path]) -> None:
    acme()
    raw = json.loads((paths[1] / "config.json").read_text())
    with pytest.raises(ConfigError, match="'num_experts' under two names"):
        MoEConfig.from_hf({**raw, "num_experts": 4})
    with pytest.raises(ConfigError, match="contradicts the True of every acme_moe"):
        MoEConfig.from_hf({**raw, "norm_topk_prob": False})
    register_family("flat_moe", "qwen3_moe", names={"q_proj": "k_proj"})
    flat = json.loads((paths[0] / "config.json").read_text()) | {"model_type": "flat_moe"}
    with pytest.raises(ConfigError, match="give two tensors the same name"):
        MoECausalLM.from_config(flat)
