# SPDX-License-Identifier: Apache-2.0
"""DPO, IPO and KTO: formulas, pairs, the reference, and folds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from lightning_moefold.models.batch import IGNORED
from lightning_moefold.recipes import InputError, PreferenceData, PreferenceModule
from lightning_moefold.recipes.preference import dpo_loss, ipo_loss, kto_loss, log_probabilities
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.recipes import preferred
from tests.recipes.chats import TALK, TEMPLATES, chat_tokenizer, write

# ---- formulas ----------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_are_their_formulas():
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (4 * torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(2))
    desired = torch.tensor([True, False, True, True, False, False])
    pairs = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
    assert dpo_loss(chosen, rejected, 0.3).tolist() == pytest.approx(
        [-math.log(sigmoid(0.3 * (c - r))) for c, r in pairs], rel=1e-12
    )
    assert ipo_loss(chosen, rejected, 0.3).tolist() == pytest.approx(
        [(c - r - 1 / 0.6) ** 2 for c, r in pairs], rel=1e-12
    )
    point = torch.tensor(0.7, dtype=torch.float64)
    wanted = [
        2 * (1 - sigmoid(0.3 * (x - 0.7))) if wish else 3 * (1 - sigmoid(0.3 * (0.7 - x)))
        for x, wish in zip(chosen.tolist(), desired.tolist(), strict=True)
    ]
    assert kto_loss(chosen, desired, point, 0.3, (2.0, 3.0)).tolist() == pytest.approx(wanted, rel=1e-12)


def test_log_probabilities_are_those_of_the_labels():
    logits = torch.randn(2, 7, 11, dtype=torch.float64)
    labels = torch.randint(11, (2, 7))
    labels[0, :3] = labels[1, 5:] = IGNORED
    sums, counts = log_probabilities(logits, labels)
    for row in range(2):
        wanted = [
            math.log(torch.softmax(logits[row, s - 1], 0)[label].item())
            for s, label in enumerate(labels[row].tolist())
            if label != IGNORED and s
        ]
        assert sums[row].item() == pytest.approx(sum(wanted), rel=1e-12)
        assert counts[row].item() == len(wanted)


def trl_self(**fields: Any) -> MagicMock:
    """What trl's code asks its trainer for."""
    me = MagicMock(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0],
        use_weighting=False, beta=0.3, desirable_weight=1.0, undesirable_weight=1.5, calculate_KL=True, **fields,
    )  # fmt: skip
    me.accelerator.gather_for_metrics = me.accelerator.gather = lambda x: x
    me.accelerator.device = torch.device("cpu")
    return me


def outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_losses_are_those_of_trl_on_the_same_logits(tmp_path, loss):
    pytest.importorskip("trl")
    draw = torch.Generator().manual_seed(1)
    pairs, length, vocabulary = 3, 9, 13
    logits = torch.randn(
        2 * pairs, length, vocabulary, generator=draw, dtype=torch.float64
    )  # chosen and rejected by turns
    ids = torch.randint(vocabulary, (2 * pairs, length), generator=draw)
    mask = torch.zeros_like(ids)
    for row in range(2 * pairs):
        mask[row, 2 + row % 3 : 6 + row % 4] = 1
    labels = ids.masked_fill(mask == 0, IGNORED)
    reference = 3 * torch.randn(2 * pairs, generator=draw, dtype=torch.float64) - 12
    token_logps = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]
    make_checkpoint(tmp_path, "mixtral")
    module = PreferenceModule(str(tmp_path), loss, 0.3, undesirable_weight=1.5 if loss == "kto" else 1.0)
    sums, counts = log_probabilities(logits, labels)
    ratio = sums - reference
    turns = torch.cat([torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2)])  # trl has all chosen ones first
    if loss == "kto":
        from trl import KTOTrainer

        kl, kl_reference = (torch.randn(2 * pairs, generator=draw, dtype=torch.float64) for _ in range(2))
        point = (kl - kl_reference).mean().clamp(min=0)
        desired = torch.tensor([True, False, True, True, False, False])
        mine = module._losses(ratio, counts, desired=desired, point=point)[0].mean()
        me = trl_self(loss_type="kto")
        me._compute_kl_logps = lambda *_: kl
        batch = {"label": desired, "input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids),
                 "ref_logps": reference, "ref_KL_logps": kl_reference}  # fmt: skip
        theirs = KTOTrainer._compute_loss(me, lambda **_: outputs(token_logps), batch, False)
    else:
        from trl import DPOTrainer

        mine = module._losses(ratio, counts)[0].mean()
        me = trl_self(loss_types=["sigmoid" if loss == "dpo" else "ipo"])
        batch = {"input_ids": ids[turns], "completion_mask": mask[turns], "attention_mask": torch.ones_like(ids),
                 "ref_chosen_logps": reference[::2], "ref_rejected_logps": reference[1::2]}  # fmt: skip
        theirs = DPOTrainer._compute_loss(me, lambda **_: outputs(token_logps[turns]), batch, False)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)


# ---- data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template, preferences and feedback; ten of each."""
    folder = tmp_path_factory.mktemp("preferences")
    chat_tokenizer(folder / "tokenizer", "qwen2")
    make_checkpoint(folder / "checkpoint", "qwen2_moe", vocab_size=420)
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / "checkpoint" / file.name)
    words = ["one", "two", "three", "four", "five"]
    rows = [(f"What is {a} and {b}?", f"{b.capitalize()}, I think.", f"{a}!" * 3) for a in words[:2] for b in words]
    write(folder / "preference.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    write(folder / "feedback.jsonl", [
        {"prompt": p, "completion": c if n % 3 else r, "label": bool(n % 3)} for n, (p, c, r) in enumerate(rows)
    ])  # fmt: skip
    return folder


def made(
    folder: Path, rows: list[dict[str, Any]], kind: str = "preference", length: int = 96, **changes: Any
) -> PreferenceData:
    file = write(folder / "rows.jsonl", rows)
    data = PreferenceData(
        [str(file)], str(folder / "checkpoint"), kind, length, 2, val_fraction=0.0,
        **{"shuffle": False, "cache_dir": str(folder / "tokens")} | changes,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data


def said(folder: Path, batch: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Whole text and labels of each row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    return [
        (tokenizer.decode(ids[mask == 1]), tokenizer.decode(labels[labels != IGNORED]))
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]


def test_pairs(folder):
    rows = [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": TALK[:4], "chosen": [TALK[4]], "rejected": [{"role": "assistant", "content": "Nine."}]},
        {"chosen": [*TALK[1:3]], "rejected": [TALK[1], {"role": "assistant", "content": "Nine."}]},
    ]
    batches = list(made(folder, rows).train_dataloader())
    found = [row for batch in batches for row in said(folder, batch)]
    assert [labels for _, labels in found] == [
        "Yes<|im_end|>", "No<|im_end|>", "Three, I think.<|im_end|>", "Nine.<|im_end|>", "Two.<|im_end|>", "Nine.<|im_end|>",
        "", "",
    ]  # fmt: skip
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        assert chosen[0].removesuffix(chosen[1] + "\n") == rejected[0].removesuffix(rejected[1] + "\n")
    assert [batch["pair"].tolist() for batch in batches] == [[0, 1], [2, -1]]


def test_feedback_has_the_answer_of_the_next_example(folder):
    rows = [{"prompt": f"Question {n}", "completion": f"Answer {n}", "label": n != 1} for n in range(3)]
    batches = list(made(folder, rows, "feedback").train_dataloader())
    found = [row for batch in batches for row in said(folder, batch)]
    for n in range(3):
        assert [f"Question {n}" in text for text, _ in found[2 * n : 2 * n + 2]] == [True, True]
        assert [labels for _, labels in found[2 * n : 2 * n + 2]] == [
            f"Answer {n}<|im_end|>", f"Answer {(n + 1) % 3}<|im_end|>"
        ]  # fmt: skip
    assert [batch["desired"].tolist() for batch in batches] == [[True, False], [True, False]]


def test_a_reference_of_other_rows_is_refused(folder):
    rows = [json.loads(line) for line in (folder / "preference.jsonl").read_text().splitlines()]
    edited = [rows[0] | {"chosen": "Other."}, *rows[1:]]

    def resumed(data: PreferenceData, checkpoint: dict[str, Any]) -> PreferenceModule:
        module = PreferenceModule(str(folder / "checkpoint"))
        module._check_data, module._model = lambda: data, lambda: None
        module.on_load_checkpoint(checkpoint)
        module._refer("train")
        return module

    first = made(folder, rows)
    old = {"preference_reference": {"train": torch.zeros(len(first.part("train")), 2)}}
    checkpoint: dict[str, Any] = {}
    resumed(first, old).on_save_checkpoint(checkpoint)  # that of a version without fingerprints is believed
    assert set(checkpoint["preference_rows"]) == {"train"}
    resumed(made(folder, rows, shuffle=True, seed=5, processes=1), checkpoint)
    template = {"chat_template": str(TEMPLATES / "qwen3.jinja")}
    for other in (
        made(folder, rows[::-1]),
        made(folder, edited),
        made(folder, rows, length=90),
        made(folder, rows, **template),
    ):
        assert len(other.part("train")) == len(first.part("train"))
        with pytest.raises(InputError, match="the reference of other rows than those of train"):
            resumed(other, checkpoint)


def test_long_answers(folder):
    rows = [
        {"prompt": "Hi", "chosen": "Yes " * 60, "rejected": "No"},
        {"prompt": "Hi " * 90, "chosen": "Yes", "rejected": "No"},
    ]
    with pytest.warns(
        UserWarning, match="of 2 examples, 1 cut to their first 80 tokens; 1 left out, as nothing of an answer"
    ):
        [batch] = made(folder, rows, length=80).train_dataloader()
    assert batch["input_ids"].shape == (4, 80)
    assert batch["pair"].tolist() == [0, -1]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("preference", {"prompt": "a", "chosen": "b"}, "line 1 is not a JSON object with 'chosen', 'rejected'; its keys are"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same, so that nothing can be learned"),
        ("preference", {"chosen": TALK[1:3], "rejected": TALK[3:]}, "begin with different messages"),
        ("feedback", {"prompt": "a", "completion": "b", "label": 1}, '"label" is 1; give true'),
        ("feedback", {"prompt": "a", "completion": "b", "label": True}, "of 1 examples 1 have an answer"),
    ],
)  # fmt: skip
def test_wrong_rows(folder, kind, row, message):
    with pytest.raises(InputError, match=message):
        made(folder, [row], kind)


def test_wrong_settings(tmp_path):
    with pytest.raises(InputError, match="loss='orpo' is not known; use 'dpo', 'ipo' or 'kto'"):
        PreferenceModule(str(tmp_path), "orpo")
    with pytest.raises(InputError, match="beta=0 must be above 0"):
        PreferenceModule(str(tmp_path), beta=0)
    with pytest.raises(InputError, match="desirable_weight=-1 must be at least 0"):
        PreferenceModule(str(tmp_path), desirable_weight=-1)
    with pytest.raises(InputError, match="undesirable_weight=2.0 is KTO's, and loss='ipo' has no such weight"):
        PreferenceModule(str(tmp_path), "ipo", undesirable_weight=2.0)
    with pytest.raises(InputError, match="preferences count pairs"):
        PreferenceModule(str(tmp_path), calculate_per_token_loss=True)
    with pytest.raises(InputError, match="kind='pairs'"):
        PreferenceData(["a.jsonl"], str(tmp_path), "pairs")


# ---- training ----------------------------------------------------------------------------------------------------


def oracle(folder: Path, loss: str) -> float:
    """The loss of the first batch after one step would need the step; before it, log 2 and (1 / 2 beta)^2 prove the reference."""
    return {"dpo": math.log(2), "ipo": (1 / 0.6) ** 2}[loss]


def reference_of(folder: Path) -> torch.Tensor:
    """Log-probabilities of every training answer, by Hugging Face's code, one row at a time."""
    data = PreferenceData(
        [str(folder / "preference.jsonl")], str(folder / "checkpoint"), "preference", 96, 1, val_fraction=0.2, shuffle=False,
        cache_dir=str(folder / "tokens"),
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    model = hf_reference(folder / "checkpoint")
    rows = []
    for batch in data.train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            size = int(mask.sum())
            with torch.no_grad():
                logits = model(ids[:size].unsqueeze(0)).logits
            rows.append(log_probabilities(logits, labels[:size].unsqueeze(0))[0])
    return torch.cat(rows).view(-1, 2).double()


@pytest.mark.more
def test_training_is_the_same_under_every_fold(pool: RankPool, folder: Path, tmp_path: Path):
    """Loss, reference and weights, with the auxiliary loss; a pipeline cuts micro-batches between pairs."""
    cases = [("dpo", "pp2 | ep2", 2), ("kto", "tp2 | ep2 etp2", 1), ("ipo", "cp2 | ep4", 2)]
    base = [{"folder": str(folder), "loss": loss, "fold": "", "microbatches": m} for loss, _, m in cases]
    [alone] = pool.run(preferred.several, base, ranks=1)
    seen = pool.run(
        preferred.several, [case | {"fold": fold} for case, (_, fold, _) in zip(base, cases, strict=True)], ranks=4
    )
    torch.testing.assert_close(alone[0].reference, reference_of(folder), rtol=1e-9, atol=0)
    for number, (loss, _, _) in enumerate(cases):
        one = alone[number]
        assert one.load == 0  # the reference is not counted
        if loss != "kto":
            assert one.losses[0] == pytest.approx(oracle(folder, loss), rel=1e-9)
        assert one.totals[0] > one.losses[0]  # the auxiliary loss is on
        assert one.losses[-1] != pytest.approx(one.losses[0], rel=1e-3)
        whole = assemble([one.weights])
        for rank in seen:
            assert rank[number].losses == pytest.approx(one.losses, rel=1e-9)
            assert rank[number].totals == pytest.approx(one.totals, rel=1e-9)
            assert rank[number].metrics == pytest.approx(one.metrics, rel=1e-8, abs=1e-12)
            assert rank[number].load == 0
        for name, weight in assemble([rank[number].weights for rank in seen]).items():
            error = (weight - whole[name]).abs().max() / whole[name].abs().max()
            assert error < 1e-9, name


@pytest.mark.more
def test_a_resumed_run_keeps_its_reference(pool: RankPool, folder: Path, tmp_path: Path):
    case = {"folder": str(folder), "loss": "dpo", "fold": ""}
    [[whole]] = pool.run(preferred.several, [case | {"save": str(tmp_path)}], ranks=1)
    again = pool.run(preferred.several, [case | {"fold": "| ep2", "resume": str(tmp_path / "step=1.ckpt")}], ranks=2)
    for [rank] in again:
        assert torch.equal(rank.reference, whole.reference)
        assert rank.losses == pytest.approx(whole.losses[1:], rel=1e-9)


def test_a_batch_is_not_cut_through_a_pair(pool: RankPool, folder: Path):
    with pytest.raises(
        Exception, match="num_microbatches=3 would cut a batch of 4 pairs on each data rank through a pair"
    ):
        pool.run(preferred.fit, str(folder), "dpo", "", 3, ranks=1)
