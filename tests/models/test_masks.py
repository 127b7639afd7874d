# SPDX-License-Identifier: Apache-2.0
"""Attention masks: padding in every place as in `transformers`, documents that a mask numbers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moefold import MoECausalLM
from lightning_moefold.models.masks import find_targets
from lightning_moefold.recipes import distillation_loss
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint
from tests.models import jobs_masks

pytestmark = pytest.mark.filterwarnings("ignore:router_aux_loss_coef")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("masks") / "model", "qwen3_moe", vocab_size=96)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks") / "windowed"
    return make_checkpoint(folder, "mixtral", vocab_size=96, sliding_window=3)


def batch(numbers: tuple[int, ...]) -> dict[str, Tensor]:
    found = [jobs_masks.rows(96)[n] for n in numbers]
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def without_undefined(labels: Tensor, mask: Tensor, window: int) -> Tensor:
    """-100 for a label whose position before sees no token, one position after the other."""
    kept = labels.clone()
    for b, t in torch.cartesian_prod(torch.arange(len(labels)), torch.arange(1, labels.shape[1])).tolist():
        if not mask[b, max(0, t - window) : t].any():
            kept[b, t] = -100
    return kept


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("model", ["path", "windowed"])
def test_padding_in_every_place_is_as_in_transformers(request: Any, model: str, kind: torch.dtype) -> None:
    """Labels of padding are trained on, as there, where anything defines what predicts them."""
    folder, window = request.getfixturevalue(model), 99 if model == "path" else 3
    data = batch((0, 1, 2, 3, 4))
    reference = hf_reference(folder, output_router_logits=True)
    labels = without_undefined(data["labels"], data["attention_mask"], window)
    assert 7 < int((labels != data["labels"]).sum()) < 20
    row = slice(0, 4)  # Hugging Face's auxiliary loss takes no row without a token
    expected = reference(**{name: x[row] for name, x in (data | {"labels": labels}).items()}, use_cache=False)
    expected.loss.backward()
    ours = MoECausalLM.from_pretrained(folder, torch.float64, output_router_logits=True)
    got = ours(**data | {"attention_mask": data["attention_mask"].to(kind)})
    got.loss.backward()
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
    grads = dict(ours.named_parameters())
    for name, parameter in reference.named_parameters():
        if name in grads:
            error = (grads[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert error < 1e-9, name
    assert len(grads.keys() & dict(reference.named_parameters()).keys()) > 15


def test_logits_of_padding_are_those_of_transformers(path: Path) -> None:
    data = batch((0, 2, 3))
    data.pop("labels")
    with torch.no_grad():
        expected = hf_reference(path)(**data, use_cache=False).logits
        got = MoECausalLM.from_pretrained(path, torch.float64)(**data).logits
    assert (got - expected).abs().max() < 1e-10


def test_a_mask_that_numbers_documents(path: Path) -> None:
    """Each document is as alone; padding belongs to the document before it."""
    data = batch((0, 1, 5, 6, 7))
    reference, total, count = hf_reference(path), 0.0, 0
    for token_S, mask_S in zip(data["input_ids"], data["attention_mask"], strict=True):
        ids = mask_S.tolist()
        first = next(n for n in ids if n)
        for t, n in enumerate(ids):
            ids[t] = n or (ids[t - 1] if t else first)
        for n in set(ids):
            here = torch.tensor(ids) == n
            tokens, real = token_S[here][None], (mask_S[here] > 0).long()[None]
            labels = without_undefined(tokens, real, 99)
            with torch.no_grad():
                logits = reference(tokens, attention_mask=real, use_cache=False).logits
            total += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100).item()
            count += int((labels[0, 1:] != -100).sum())
    with torch.no_grad():
        got = MoECausalLM.from_pretrained(path, torch.float64)(**data)
    assert got.lm_loss.item() == pytest.approx(total / count, rel=1e-10)
    target_BS = find_targets(data["labels"], data["attention_mask"], None, None)
    assert int((target_BS != -100).sum()) == count


DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
LEFT = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])


@pytest.mark.parametrize(
    "given", [{"document_ids": DOCUMENTS}, {"attention_mask": 1 + DOCUMENTS}, {"attention_mask": LEFT}]
)
def test_a_loss_fn_gets_the_labels_that_the_models_own_loss_counts(path: Path, given: dict[str, Tensor]) -> None:
    model = MoECausalLM.from_pretrained(path, torch.float64)
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    data = {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100), **given}
    counts = []

    def loss_fn(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(int((labels[:, 1:] != -100).sum()))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"), torch.tensor(
            counts[-1]
        )

    own, usual = model(**data, loss_fn=loss_fn), model(**data)
    wanted = find_targets(data["labels"], given.get("attention_mask"), given.get("document_ids"), None)
    assert counts == [int((wanted != -100).sum())]
    assert own.lm_loss.item() == pytest.approx(usual.lm_loss.item(), rel=1e-12)
    teacher = {"teacher_logprobs": torch.zeros(2, 10, 1), "teacher_ids": torch.zeros(2, 10, 1, dtype=torch.int64)}
    distilled = model(**data, loss_fn=distillation_loss(0.0), **teacher)
    assert distilled.lm_loss.item() == pytest.approx(usual.lm_loss.item(), rel=1e-12)


TOKENS = torch.arange(12).view(2, 6)
MASK = torch.ones_like(TOKENS)
WRONG = {
    "float mask": ({"attention_mask": MASK.double()}, "attention_mask has the dtype torch.float64"),
    "additive mask": ({"attention_mask": torch.zeros(2, 6)}, "masks that are added to scores are not read"),
    "negative mask": ({"attention_mask": MASK.masked_fill(TOKENS == 3, -1)}, "attention_mask holds -1; give 1 for tokens"),
    "mask of whole rows": ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask has shape .* make them equal"),
    "documents twice": (
        {"attention_mask": 1 + MASK.cumsum(1) // 4, "document_ids": MASK}, "numbers documents .up to 2. beside document_ids"
    ),
    "float documents": ({"document_ids": MASK.double()}, "document_ids has the dtype torch.float64; give integers"),
    "float positions": ({"position_ids": MASK.cumsum(1).float()}, "position_ids has the dtype torch.float32"),
    "float labels": ({"labels": TOKENS.float()}, "labels has the dtype torch.float32; give integers"),
    "bool labels": ({"labels": TOKENS > 3}, "labels has the dtype torch.bool; give integers"),
    "bool tokens": ({"input_ids": TOKENS > 3}, "input_ids must be integers"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_honoured_is_refused(path: Path, case: str) -> None:
    wrong, message = WRONG[case]
    model = MoECausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match=message) as caught:
        model(**{"input_ids": TOKENS, "labels": TOKENS} | wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.float(), "dtype torch.float32"),
        (MASK.masked_fill(TOKENS == 0, -1), "holds -1"),
        (MASK.cumsum(1), "numbers documents, but a prompt is one document"),
    ],
)
def test_masks_of_prompts(path: Path, mask: Tensor, message: str) -> None:
    model = MoECausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match=message):
        model.generate(TOKENS, mask)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_every_size(path: Path, kind: torch.dtype) -> None:
    model = MoECausalLM.from_pretrained(path)
    data = {"input_ids": TOKENS, "labels": TOKENS, "document_ids": MASK.cumsum(1) // 4, "position_ids": TOKENS}
    with torch.no_grad():
        assert model(**{name: x.to(kind) for name, x in data.items()}).loss == model(**data).loss


@pytest.mark.more
def test_masks_under_folds(pool: RankPool, path: Path) -> None:
    [(expected, validation)] = pool.run(jobs_masks.losses, str(path), "", 1, 1, ranks=1)
    assert len(expected) == 2
    for ranks, fold, data_ranks in ((2, "cp2 | ep2", 1), (2, "| ep2", 2), (4, "tp2 cp2 | etp2 ep2", 1)):
        for losses, val in pool.run(jobs_masks.losses, str(path), fold, 1, data_ranks, ranks=ranks):
            assert losses == pytest.approx(expected, rel=1e-9), fold
            assert val == pytest.approx(validation, rel=1e-6), fold
    [(expected, validation)] = pool.run(jobs_masks.losses, str(path), "", 2, 1, ranks=1)
    for losses, val in pool.run(jobs_masks.losses, str(path), "cp2 pp2 | ep2", 2, 1, ranks=4):
        assert losses == pytest.approx(expected, rel=1e-9)
        assert val == pytest.approx(validation, rel=1e-6)


def test_validation_weighs_the_labels_that_the_model_counts(pool: RankPool, path: Path) -> None:
    """Batches of two rows have unequal numbers of them."""
    [together] = pool.run(jobs_masks.validation, str(path), 8, ranks=1)
    [apart] = pool.run(jobs_masks.validation, str(path), 2, ranks=1)
    assert apart == pytest.approx(together, rel=1e-6)
