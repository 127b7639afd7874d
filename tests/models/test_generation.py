# SPDX-License-Identifier: Apache-2.0
"""Generated text is that of transformers token for token, under every fold and on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.models.generation import Sampling, draw
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint, relative_error
from tests.models import jobs_generation
from tests.quick import quick

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": (
        "qwen2_moe",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "mixtral": ("mixtral", {"sliding_window": 5, "vocab_size": 97}),
    "qwen3": ("qwen3_moe", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}
FOLDS = [
    "tp2 | ep4",
    "tp2 | etp2 ep2",
    "tp4 | ep4",
    "| ep2",
    "cp2 | ep2 etp2",
    "tp2 pp2 | etp2",
    "cp2 pp2",
    "pp2 | ep2",
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {n: str(make_checkpoint(folder / n, family, **fields)) for n, (family, fields) in MODELS.items()}


def prompts(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random prompts of unequal lengths, padded on the left; the first one is the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 96, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) >= length - lengths).long()
    return ids * mask, mask


def theirs(path: str, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return hf_reference(path).generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)


@pytest.mark.parametrize("name", quick(MODELS, "qwen2"))
def test_greedy_text_is_that_of_transformers(pool: RankPool, paths: dict[str, str], name: str) -> None:
    """On each data rank another number of prompts (zero too), lengths, and ends."""
    ids, mask = prompts(4, 7, 1)
    free = theirs(paths[name], ids, mask, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    ends = [int(free[1, 9]), int(free[3, 12])]  # two rows end early, at different times
    options = {"max_new_tokens": 9, "eos_token_id": ends, "pad_token_id": 0}
    given = [(ids, mask), prompts(1, 4, 3), (ids[:0], mask[:0]), prompts(2, 3, 2)]
    expected = [theirs(paths[name], *p, **options) if len(p[0]) else p[0] for p in given]
    assert len({text.shape for text in expected}) > 2
    for fold in FOLDS:
        outcome = pool.run(jobs_generation.generate, paths[name], fold, given, [options], "optimizer", ranks=4)
        for rank, [text] in enumerate(outcome):
            place = Fold.parse(fold, 4).coordinates(rank)["dp"]
            assert torch.equal(text, expected[place]), (fold, rank)


@pytest.mark.parametrize("mode", quick(["full", "none"], "full"))
@pytest.mark.more
def test_stored_in_other_ways(pool: RankPool, paths: dict[str, str], mode: str) -> None:
    given = [prompts(2, 5, 4), prompts(3, 2, 5)]
    options = {"max_new_tokens": 6, "eos_token_id": ()}
    expected = [theirs(paths["qwen2"], *p, max_new_tokens=6, eos_token_id=None, pad_token_id=0) for p in given]
    outcome = pool.run(jobs_generation.generate, paths["qwen2"], "tp2 | ep2", given, [options], mode, ranks=4)
    for rank, [text] in enumerate(outcome):
        assert torch.equal(text, expected[rank // 2])


@pytest.mark.parametrize("name", quick(MODELS, "qwen2"))
@pytest.mark.parametrize("fold", quick(["tp4 | ep4", "tp2 | etp2 ep2"], "tp2 | etp2 ep2"))
@pytest.mark.more
def test_cached_logits_are_those_of_whole_rows(pool: RankPool, paths: dict[str, str], name: str, fold: str) -> None:
    ids, mask = prompts(3, 5, 6)
    more = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(7))
    tokens, real = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    for cached, whole in pool.run(jobs_generation.stepwise, paths[name], fold, tokens, real, 5, ranks=4):
        assert cached.shape == whole.shape == (3, 10, whole.shape[-1])
        assert relative_error(cached, whole) < 1e-12


SAMPLINGS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    {"top_k": 1000, "top_p": 1.0},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_tokens_are_drawn_from_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 3
    logits_BV[0, :10] = 2.0  # ties
    config = GenerationConfig(**{"do_sample": True, "top_k": None, "top_p": 1.0, "temperature": 1.0, **options})
    processors = GenerationMixin()._get_logits_processor(config, 1)
    expected = processors(torch.zeros(6, 1, dtype=torch.int64), logits_BV.clone()).softmax(-1)
    actual = Sampling(**options).probabilities(logits_BV)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_draws_have_their_probabilities() -> None:
    """Uniform numbers on a fine grid fall on each token in proportion, and never on one that is left out."""
    probability_1V = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = draw(probability_1V.expand(1000, -1), grid).bincount(minlength=6)
    assert counts.tolist() == [0, 250, 0, 500, 250, 0]
    assert draw(probability_1V, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [4]
    assert draw(probability_1V, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]


@pytest.mark.slow
def test_a_seed_gives_the_same_text_under_every_fold(pool: RankPool, paths: dict[str, str]) -> None:
    """Prompts are dealt to the data ranks in turn, and the longest ones do not all end up on one of them."""
    ids, mask = prompts(8, 5, 9)
    ids[1::2], mask[1::2] = ids[0::2], mask[0::2]  # pairs of equal prompts get different texts
    options = {
        "max_new_tokens": 10,
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 30,
        "top_p": 0.9,
        "eos_token_id": (),
    }
    runs = [{**options, "seed": 1}, {**options, "seed": 2}, options]
    model = MoECausalLM.from_pretrained(paths["mixtral"], torch.float64)
    one, two = (model.generate(ids, mask, **run) for run in runs[:2])
    assert not torch.equal(one, two)
    assert not any(torch.equal(one[i], one[i + 1]) for i in range(0, 8, 2))
    for fold in FOLDS:
        outcome = pool.run(jobs_generation.generate, paths["mixtral"], fold, [(ids, mask)], runs, "optimizer", ranks=4)
        parts = Fold.parse(fold, 4)
        unseeded: dict[int, Tensor] = {}
        for rank, (first, second, drawn) in enumerate(outcome):
            place = parts.coordinates(rank)["dp"]
            assert torch.equal(first, one[place :: parts.dp]), (fold, rank)
            assert torch.equal(second, two[place :: parts.dp]), (fold, rank)
            assert torch.equal(unseeded.setdefault(place, drawn), drawn), "tp ranks drew different texts"


def test_special_tokens_of_the_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", "qwen3_moe", pad_token_id=0)
    ids, mask = prompts(3, 6, 10)
    reference = hf_reference(path)
    free = reference.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=9, eos_token_id=None)
    end = int(free[1, 8])
    (path / "generation_config.json").write_text(f'{{"eos_token_id": [{end}], "pad_token_id": 0}}')
    model = MoECausalLM.from_pretrained(path, torch.float64)
    expected = theirs(str(path), ids, mask, max_new_tokens=9)
    assert bool((expected[1, 9:] == 0).all())
    assert torch.equal(model.generate(ids, mask, max_new_tokens=9), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=9), expected)  # padding is seen by its token
    assert torch.equal(model.generate(ids, mask, max_new_tokens=9, eos_token_id=()), free)
    mine = model.generate(ids, mask, max_new_tokens=9, eos_token_id=end)
    assert torch.equal(mine, expected)


GOOD = torch.tensor([[1, 2, 3]])
ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no new tokens": ((GOOD, None), {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    "empty": ((GOOD[:, :0], None), {}, "a prompt holds no token"),
    "all padding": ((GOOD, torch.zeros(1, 3, dtype=torch.int64)), {}, "a prompt holds no token"),
    "right": ((GOOD, torch.tensor([[1, 1, 0]])), {}, "on the right; pad them on the left"),
    "long": ((torch.ones(1, 129, dtype=torch.int64), None), {}, "129 tokens, more than max_position_embeddings=128"),
    "floats": ((GOOD.float(), None), {}, "must be integers"),
    "mask": ((GOOD, torch.ones(1, 2)), {}, "make them equal"),
    "token": ((GOOD + 95, None), {}, "outside the vocabulary"),
    "temperature": ((GOOD, None), {"do_sample": True, "temperature": 0.0}, "must be positive"),
    "top_k": ((GOOD, None), {"do_sample": True, "top_k": 0}, "top_k=0 must be at least 1"),
    "top_p": ((GOOD, None), {"do_sample": True, "top_p": 1.5}, "top_p=1.5 must lie above 0"),
}


@pytest.mark.parametrize("fold", quick(["", "tp2 | ep4"], "tp2 | ep4"))
@pytest.mark.more
def test_errors_reach_every_rank(pool: RankPool, paths: dict[str, str], fold: str) -> None:
    runs = {name: (given, options) for name, (given, options, _) in ERRORS.items()}
    for rank, seen in enumerate(pool.run(jobs_generation.errors, paths["qwen2"], fold, runs, ranks=4)):
        guilty = Fold.parse(fold, 4).coordinates(rank)["dp"] == 0
        for name, (_, _, message) in ERRORS.items():
            if guilty or name == "token":
                assert seen[name].startswith(("InputError", "BatchError")), seen[name]
                assert message in seen[name], seen[name]
            else:
                assert seen[name] == "PeerError: another rank has failed; its own error says why.", name
        assert seen["good again"] == "no error"
