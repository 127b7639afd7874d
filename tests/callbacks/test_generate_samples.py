# SPDX-License-Identifier: Apache-2.0
"""Texts that a model writes during training: the same under every fold, and training does not notice."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_moefold.callbacks import GenerateSamples
from lightning_moefold.models.texts import pad_left
from lightning_moefold.testing import RankPool, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.callbacks import jobs_generate_samples


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, moe_intermediate_size=8))


@pytest.mark.parametrize(
    ("ranks", "fold", "sharding"),
    [
        (2, "| ep2", "full"),
        pytest.param(4, "| ep2", "full", marks=pytest.mark.more),
        pytest.param(4, "tp2 | ep4", "optimizer", marks=pytest.mark.slow),
        pytest.param(4, "| ep4", "none", marks=pytest.mark.slow),
    ],
)
@pytest.mark.more
def test_training_goes_on_exactly(pool: RankPool, path: str, ranks: int, fold: str, sharding: str) -> None:
    """Generating between forward, backward and step changes no bit of weights, losses, counters and random state."""
    [alone] = pool.run(jobs_generate_samples.fit, path, "", True, sharding, ranks=1)
    without = pool.run(jobs_generate_samples.fit, path, fold, False, sharding, ranks=ranks)
    outcome = pool.run(jobs_generate_samples.fit, path, fold, True, sharding, ranks=ranks)
    for ours, theirs in zip(outcome, without, strict=True):
        assert (ours["losses"], ours["validation"]) == (theirs["losses"], theirs["validation"])
        assert all(torch.equal(ours["loads"][i], load) for i, load in theirs["loads"].items())
        assert torch.equal(ours["random"], theirs["random"])
    whole, expected = (assemble(seen["weights"] for seen in runs) for runs in (outcome, without))
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
    for seen in outcome:
        assert seen["latest"] == alone["latest"]
        assert [prompt for prompt, _ in seen["latest"]] == jobs_generate_samples.PROMPTS
        assert all(len(text.split()) == 5 for _, text in seen["latest"])
    [first, second] = outcome[0]["tables"]  # of validations 2 and 4; the table grows
    assert first[:2] == ("samples", ["step", "prompt", "text"])
    assert [row[1] for row in first[2]] == jobs_generate_samples.PROMPTS
    assert second[2][:5] == first[2]
    assert [tuple(row[1:]) for row in second[2][5:]] == outcome[0]["latest"]


def test_arguments() -> None:
    with pytest.raises(ValueError, match="list of at least one text"):
        GenerateSamples([])
    with pytest.raises(ValueError, match="list of at least one text"):
        GenerateSamples("once upon a time")
    with pytest.raises(ValueError, match="every_n_validations=0"):
        GenerateSamples(["once"], every_n_validations=0)
    ids, mask = pad_left([[1, 2], [3]])
    assert ids.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert pad_left([])[0].shape == (0, 0)


def test_a_resumed_run_counts_on() -> None:
    """The third validation is the first after the resume; the earlier texts stay in the table."""
    trainer, module = mock.Mock(sanity_checking=False), BoringModel()
    before, after = (GenerateSamples(["a"], every_n_validations=3) for _ in range(2))
    before._table = [[4, "a", "b"]]
    for _ in range(2):
        before.on_validation_end(trainer, module)
    after.load_state_dict(before.state_dict())
    assert after._table == [[4, "a", "b"]]
    with pytest.raises(TypeError, match="holds no MoECausalLM"):
        after.on_validation_end(trainer, module)
