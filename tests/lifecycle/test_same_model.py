# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of another model, or of another optimizer, is refused with what differs. Without ranks."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint.sharded import MODELS
from lightning_moefold.errors import CheckpointError
from lightning_moefold.lifecycle.same_model import check_same_model
from lightning_moefold.lifecycle.training_state import _other_groups

SHAPE = {
    "model_type": "qwen3_moe", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 4, "intermediate_size": 8, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def refusal(elsewhere: frozenset[str] = frozenset(), **changes: Any) -> str | None:
    """Resumes a model from the checkpoint of one with other fields; returns the message."""
    saved, now = MoECausalLM.from_config({**SHAPE, **changes}), MoECausalLM.from_config(SHAPE)
    registry: Any = SimpleNamespace(roots={"model": now}, layouts={}, elsewhere=elsewhere)
    state = {f"model.{name}": value for name, value in now.state_dict().items() if f"model.{name}" not in elsewhere}
    stored = {f"model.model.{name}": tuple(value.shape) for name, value in saved.state_dict().items()}
    meta = {MODELS: {"model": saved.describe()}}
    try:
        check_same_model("last.ckpt", meta, state, {**stored, "optimizer.0.x": ()}, registry)
    except CheckpointError as error:
        return str(error)
    return None


def test_another_model_is_named() -> None:
    assert refusal() is None
    wider = refusal(hidden_size=16)
    assert wider is not None
    assert wider.startswith(
        "last.ckpt is of another model (hidden_size is 16 there and 8 here): its 'model.model.embed_tokens.weight'"
    )
    assert "has shape [20, 16], and the module's has [20, 8]; load it with the model it was saved from." in wider
    shorter = refusal(num_hidden_layers=1)
    assert shorter is not None
    assert "(num_hidden_layers is 1 there and 2 here): it has no 'model.model.layers.1." in shorter
    longer = refusal(num_hidden_layers=3)
    assert longer is not None
    assert "it holds 'model.model.layers.2." in longer
    others = refusal(hidden_size=16, num_experts=8, vocab_size=30, moe_intermediate_size=6)
    assert others is not None
    assert others.partition(")")[0].endswith(", ...")


def test_another_configuration_of_the_same_shapes_is_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"configuration \(num_experts_per_tok is 1 there and 2 here\); the run goes on"
    ):
        assert refusal(num_experts_per_tok=1) is None
    with pytest.warns(UserWarning, match=r"rope_theta is 20000.0 there"):
        assert refusal(rope_theta=20000.0) is None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert refusal() is None
    assert not [w for w in said if "another configuration" in str(w.message)]


def test_what_other_stages_hold_is_not_missed() -> None:
    assert refusal(frozenset({"model.lm_head.weight"})) is None


@pytest.mark.parametrize(("saved", "mine", "told"), [
    ([["a", "b"]], [{"a"}], "does not have 'b', whose state the checkpoint holds"),
    ([["a"]], [{"a", "b"}], "has 'b', which was frozen or had another optimizer when the checkpoint was saved"),
    ([["a"], ["b"]], [{"b"}, {"a"}], "has 'a' in group 1, and the checkpoint in group 0"),
    ([["a"], ["b"]], [{"a", "b"}], "has 1 parameter groups, and the checkpoint holds the state of 2"),
])  # fmt: skip
def test_other_groups_of_an_optimizer_are_named(saved: list[list[str]], mine: list[set[str]], told: str) -> None:
    registry: Any = SimpleNamespace(elsewhere=frozenset({"c"}))
    assert _other_groups([{"params": [*names, "c"]} for names in saved], mine, registry) == told


def test_shapes_of_buffers_count() -> None:
    registry: Any = SimpleNamespace(roots={}, layouts={}, elsewhere=frozenset())
    with pytest.raises(
        CheckpointError, match=r"last.ckpt is of another model: its 'mean' has shape \[2\], and the module's has \[3\]"
    ):
        check_same_model("last.ckpt", {}, {"mean": torch.zeros(3)}, {"model.mean": (2,)}, registry)
