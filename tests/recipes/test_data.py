# SPDX-License-Identifier: Apache-2.0
"""Sources of rows, packed conversations, mixtures, and what is kept on disk."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_moefold import MoECausalLM
from lightning_moefold.cli.main import main
from lightning_moefold.errors import CheckpointError
from lightning_moefold.recipes import InputError, TextData
from lightning_moefold.recipes.documents import read_rows
from lightning_moefold.recipes.mixture import Mixture
from lightning_moefold.recipes.order import Position, RowOrder
from lightning_moefold.recipes.packing import PADDING
from lightning_moefold.recipes.store import TokenStore, write_sums
from lightning_moefold.recipes.template import Document, Kind
from lightning_moefold.recipes.tokenizing import Reading, tokenize
from lightning_moefold.testing import hf_reference, make_checkpoint
from tests.recipes.chats import TALK, chat_tokenizer, write
from tests.recipes.rows import rows_of
from tests.recipes.running import ROOT

TOOLS_ROW = {"tools": [{"name": "add"}, {"name": "say", "parameters": {"type": "object"}}]}
ROWS = [{"messages": TALK}, {"messages": TALK[1:3]}, {"messages": [*TALK[1:3], {"role": "user", "content": "Why?"}]}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen2")


def made(files: list[Path], tokenizer: Path, cache: Path, length: int = 128, **changes: Any) -> TextData:
    settings = {"val_fraction": 0.0, "cache_dir": str(cache), "shuffle": False, **changes}
    data = TextData([str(file) for file in files], str(tokenizer), length, 2, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def documents(data: TextData) -> list[tuple[list[int], list[bool]]]:
    """Tokens and labels of every document, from the batches."""
    found: dict[int, tuple[list[int], list[bool]]] = {}
    for batch in data.train_dataloader():
        for token_L, label_L, document_L in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), batch["document_ids"].tolist(), strict=True
        ):
            for token, label, document in zip(token_L, label_L, document_L, strict=True):
                if document == PADDING:
                    assert label == -100
                    continue
                tokens, trained = found.setdefault(document, ([], []))
                tokens.append(token)
                trained.append(label == token)
                assert label in (token, -100)
    return [found[number] for number in sorted(found)]


# ---- sources -----------------------------------------------------------------------------------------------------


def test_rows_are_the_same_from_every_kind_of_file(tmp_path, tokenizer):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    datasets = pytest.importorskip("datasets")
    lines = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    parquet.write_table(table.from_pylist(ROWS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "a"))
    wanted = documents(made([lines], tokenizer, tmp_path / "cache"))
    assert len(wanted) == 3
    for name in ("a.json", "a.parquet", "a"):
        data = made([tmp_path / name], tokenizer, tmp_path / "cache")
        assert documents(data) == wanted
        assert data.part("train").rows.store.name(2) == f"{name}:3"
    [row] = [raw.read() for raw in read_rows([tmp_path / "a.parquet"])][2:]
    assert row == ROWS[2]
    parquet.write_table(table.from_pylist([TOOLS_ROW]), tmp_path / "b.parquet")
    assert [raw.read() for raw in read_rows([tmp_path / "b.parquet"])] == [TOOLS_ROW]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(InputError, match=r"b holds several datasets; name one of .*b/train"):
        made([tmp_path / "b"], tokenizer, tmp_path / "cache")
    with pytest.raises(InputError, match="a directory without a dataset"):
        made([tmp_path / "cache"], tokenizer, tmp_path / "cache")


def test_a_row_that_is_wrong_is_named(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [ROWS[0], {"messages": [TALK[1], {"role": "assistant", "content": ""}]}])
    with pytest.raises(InputError, match=r"a.jsonl, line 2, message 2 is an assistant's turn without content"):
        made([file], tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-written


@pytest.mark.slow  # each process imports torch
def test_processes_do_not_change_the_tokens(tmp_path, tokenizer):
    draw = random.Random(0)
    rows = [{"text": "What is one? " * draw.randint(1, 9)} if n % 3 else ROWS[n % 2] for n in range(1300)]
    files = [write(tmp_path / "a.jsonl", rows[:700]), write(tmp_path / "b.jsonl", rows[700:])]
    stores = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        tokenize(files, Reading(str(tokenizer)), folder, processes)
        write_sums(folder)
        stores.append(TokenStore.open(folder, files))
    one, three = stores
    assert one.counts == three.counts
    assert one.counts.rows == 1300
    for name in ("tokens_T", "trained_T", "ends_N", "origins_N3"):
        assert np.array_equal(getattr(one, name)[:], getattr(three, name)[:])
    write(files[1], [*rows[700:1250], {"nothing": 1}, {"nothing": 2}])
    with pytest.raises(InputError, match="b.jsonl, line 551 is not"):
        tokenize(files, Reading(str(tokenizer)), tmp_path / "wrong", 2)


def test_tokens_are_found_again_by_content(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ROWS)
    cache = tmp_path / "cache"
    first = made([file], tokenizer, cache).cache.path([file])
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / "a.jsonl")
    moved.touch()
    assert made([moved], tokenizer, cache).cache.path([moved]) == first
    assert made([moved], tokenizer, cache, train_on="last").cache.path([moved]) != first
    write(moved, ROWS[:2])
    assert made([moved], tokenizer, cache).cache.path([moved]) != first


def test_tokens_of_another_chat_template_are_not_found(tmp_path, tokenizer):
    own = Path(shutil.copytree(tokenizer, tmp_path / "own"))
    file = write(tmp_path / "a.jsonl", ROWS)
    texts = [own / "one.jinja", own / "two.jinja"]
    for number, text in enumerate(texts):
        text.write_text("{# " + str(number) + " #}")

    def path(template: Path | None = None) -> Path:
        chosen = None if template is None else str(template)
        return TextData([str(file)], str(own), chat_template=chosen, cache_dir=str(tmp_path)).cache.path([file])

    found = {path(), *map(path, texts)}
    assert len(found) == 3
    (own / "chat_template.jinja").rename(own / "chat_template.jinja.bak")
    assert path() not in found


class _Ended:
    """Processes that end at once, after they have printed something that is no number."""

    def __init__(self, code: int) -> None:
        self.code, self.run = code, subprocess.Popen

    def __call__(self, *_: Any, **how: Any) -> subprocess.Popen[str]:
        told = f"import sys; print('loaded', flush=True); print(512); sys.stderr.write('broken'); sys.exit({self.code})"
        return self.run([sys.executable, "-S", "-c", told], **how)


@pytest.mark.parametrize(("code", "message"), [(3, "has ended: broken"), (0, "has ended before its last row")])
def test_a_process_that_prints_and_ends_early_is_an_error(tmp_path, tokenizer, monkeypatch, code, message):
    monkeypatch.setattr("lightning_moefold.recipes.tokenizing.subprocess.Popen", _Ended(code))
    chunks = "lightning_moefold.recipes.tokenizing._chunks"
    monkeypatch.setattr(chunks, lambda folder: iter(()))  # it wrote none
    with pytest.raises(RuntimeError, match=message):
        tokenize([write(tmp_path / "a.jsonl", ROWS)], Reading(str(tokenizer)), tmp_path / "folder", 2)


# ---- packing -----------------------------------------------------------------------------------------------------


def test_conversations_are_packed_whole_and_only_answers_are_labels(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", ROWS)
    data = made([file], tokenizer, tmp_path / "cache", 300)
    part = data.part("train")
    assert part.packing == "documents"
    assert len(part) == 1  # side by side
    decoded = data_tokenizer(tokenizer)
    texts = [decoded.decode([t for t, on in zip(*one, strict=True) if on]) for one in documents(data)]
    assert texts == ["Two.<|im_end|>Three, I think.<|im_end|>", "Two.<|im_end|>", "Two.<|im_end|>"]
    with pytest.raises(InputError, match="packing='blocks' cuts conversations anywhere"):
        made([file], tokenizer, tmp_path / "cache", packing="blocks")


def test_packed_conversations_do_not_see_each_other(tmp_path, tokenizer):
    """The loss of a packed batch is that of each conversation by itself in Hugging Face's code."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2_moe", vocab_size=420)
    data = made([write(tmp_path / "a.jsonl", ROWS)], tokenizer, tmp_path / "cache", 300)
    [batch] = data.train_dataloader()
    assert len(set(batch["document_ids"][0].tolist()) - {PADDING}) == 3
    model = MoECausalLM.from_pretrained(checkpoint, dtype=torch.float64, output_router_logits=True)
    found = model(**batch).lm_loss.item()
    reference, losses = hf_reference(checkpoint), []
    for tokens, trained in documents(data):
        with torch.no_grad():
            logits = reference(torch.tensor([tokens])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        losses += each[torch.tensor(trained[1:])].tolist()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def data_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_long_conversations_are_cut_and_those_without_a_label_left_out(tmp_path, tokenizer):
    long = [TALK[1], {"role": "assistant", "content": "Two. " * 200}]
    late = [{"role": "user", "content": "What? " * 200}, TALK[2]]
    asked = [TALK[0], TALK[1]]
    file = write(tmp_path / "a.jsonl", [{"messages": m} for m in (TALK[1:3], long, late, asked)])
    with pytest.warns(UserWarning, match="conversations") as seen:
        data = made([file], tokenizer, tmp_path / "cache", 100)
    told = [str(w.message) for w in seen if "conversations" in str(w.message)]
    assert told == [
        "train: of 4 conversations, 1 left out, as nothing of them is trained on; 1 cut to their first 100 tokens; "
        "1 left out, as nothing of their first 100 tokens is trained on."
    ]
    found = documents(data)
    assert [len(tokens) for tokens, _ in found] == [len(data.part("train").rows.store.document(0).tokens), 100]
    assert found[1][0] == data.part("train").rows.store.document(1).tokens[:100]
    assert found[1][1][-1]
    with pytest.raises(InputError, match="nothing of the 1 rows of .* is trained on"):
        made([write(tmp_path / "b.jsonl", [{"messages": asked}])], tokenizer, tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made([write(tmp_path / "c.jsonl", ROWS)], tokenizer, tmp_path / "cache")


def test_texts_among_conversations_are_cut_into_pieces():
    rows = rows_of([Document([1] * 25), Document([2] * 25, [False] * 5 + [True] * 20, Kind.CHAT)], "documents", 10)
    token_NL, document_NL, trained_NL = rows.take(range(len(rows)))
    sizes = {d: int((document_NL == d).sum()) for d in (0, 1)}
    assert sizes == {0: 25, 1: 10}
    assert int(trained_NL.sum()) == 25 + 5
    assert (rows.plan.cut, rows.plan.dropped) == (1, 0)
    assert torch.equal(rows.take([-1]).document_BL, torch.full((1, 10), PADDING, dtype=torch.int32))
    with pytest.raises(
        InputError, match="none of the 1 conversations has anything that is trained on in its first 10 tokens"
    ):
        rows_of([Document([2] * 25, [False] * 20 + [True] * 5, Kind.CHAT)], "documents", 10)


# ---- mixtures ----------------------------------------------------------------------------------------------------


def test_a_mixture_reads_each_source_as_often_as_its_weight_says():
    mixture = Mixture([10, 6, 4, 5], [1, 2.5, 0.5, 0])
    assert mixture.count == 10 + 15 + 2
    epochs = [mixture.draw(torch.Generator().manual_seed(epoch)).tolist() for epoch in (0, 1)]
    for rows in epochs:
        times = Counter(rows)
        assert [times[n] for n in range(10)] == [1] * 10
        assert sorted(times[n] for n in range(10, 16)) == [2, 2, 2, 3, 3, 3]
        assert sum(times[n] for n in range(16, 20)) == 2
        assert not any(times[n] for n in range(20, 25))
    assert {n for n in epochs[0] if n > 15} != {n for n in epochs[1] if n > 15} or epochs[0] != epochs[1]
    assert mixture.draw(None).tolist() == [*range(10), *range(10, 16), *range(10, 16), 10, 11, 12, 16, 17]
    with pytest.raises(
        InputError, match=r"a weight of 0.01 takes none of the 40 rows of its file .* at least 0.025, or 0"
    ):
        Mixture([10, 40], [1, 0.01])


def test_a_mixture_goes_on_under_another_number_of_ranks():
    def orders(ranks: int, batch: int) -> list[RowOrder]:
        return [
            RowOrder(9, batch, r, ranks, shuffle=True, seed=1, mixture=Mixture([5, 4], [2, 1.5])) for r in range(ranks)
        ]

    [whole] = orders(1, 4)
    wanted = torch.cat(list(whole))[: whole.count].tolist()
    seen: list[int] = []
    two = orders(2, 6)
    for order in two:
        it = iter(order)
        seen += next(it).tolist()
    seen = [row for pair in zip(seen[:3], seen[3:], strict=True) for row in pair]
    assert two[0].position == Position(0, 6, 1)
    [rest] = orders(1, 2)
    rest.go_on(two[0].position)
    seen += torch.cat(list(rest)).tolist()
    assert seen == wanted


def test_files_with_weights(tmp_path, tokenizer):
    a = write(tmp_path / "a.jsonl", [{"messages": TALK}] * 4)
    b = write(tmp_path / "b.jsonl", [{"messages": TALK[1:3]}] * 6)
    data = made([a, b], tokenizer, tmp_path / "cache", 80, weights=[1, 0.5], shuffle=True)
    part = data.part("train")
    taken = part.take(torch.arange(len(part)))
    name_of = part.rows.store.name
    files = [{name_of(d).split(":")[0] for d in row.tolist() if d != PADDING} for row in taken.document_BL]
    assert all(len(names) == 1 for names in files)  # rows of one source
    sizes = Counter(next(iter(names)) for names in files)
    assert len(data.train_dataloader()) == -(-(sizes["a.jsonl"] + round(sizes["b.jsonl"] / 2)) // 2)


# ---- resuming and evaluating -------------------------------------------------------------------------------------


def test_no_run_goes_on_in_the_middle_of_an_epoch_of_another_order(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"messages": TALK}] * 6)
    data = made([file], tokenizer, tmp_path, 80, shuffle=True)
    batches = list(data.train_dataloader().sampler)
    fitting = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), fit_loop=SimpleNamespace(), overfit_batches=0,
        distributed_sampler_kwargs=None, lightning_module=torch.nn.Module(),
    )  # fmt: skip

    def resumed(state: dict[str, Any], **changes: Any) -> list[list[int]]:
        other = made([file], tokenizer, tmp_path, changes.pop("length", 80), **{"shuffle": True, **changes})
        other.trainer = fitting
        other.load_state_dict(state)
        return [rows.tolist() for rows in other.train_dataloader().sampler]

    loader = data.train_dataloader()
    next(iter(loader))
    state = data.state_dict()
    assert resumed(state) == [rows.tolist() for rows in batches[1:]]
    for changes, told in [
        ({"seed": 1}, "seed=0, and this run has seed=1,"),
        ({"shuffle": False}, "shuffle=True, and this run has shuffle=False,"),
        ({"weights": [2]}, r"rows=6, weights=None, and this run has rows=12, weights=\[2\],"),
        ({"packing": "documents", "length": 90}, "sequence_length=80, and this run has sequence_length=90,"),
    ]:
        with pytest.raises(CheckpointError, match=f"in the middle of an epoch of data with {told} so rows would be"):
            resumed(state, **changes)
    old = {name: value for name, value in state.items() if name != "order"}  # of an earlier version
    assert len(resumed(old, seed=1)) == 2
    list(loader)
    assert resumed(data.state_dict(), weights=[2]) == []  # this epoch is over, and more rows do not prolong it


def test_validation_alone_without_rows_is_refused(tmp_path, tokenizer):
    data = made([write(tmp_path / "a.jsonl", ROWS)], tokenizer, tmp_path)
    assert data.val_dataloader() == []
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING), lightning_module=torch.nn.Module())
    with pytest.raises(InputError, match="there is no text to validate on; give val_files, or"):
        data.val_dataloader()


# ---- preview -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", ["never", "always"])
def test_preview(tmp_path, tokenizer, capsys, colour):
    file = write(tmp_path / "a.jsonl", [*ROWS, {"messages": TALK[:2]}])
    settings = {"files": [str(file)], "tokenizer": str(tokenizer), "sequence_length": 150, "val_fraction": 0.0}
    config = tmp_path / "run.yaml"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "seed_everything": 1,
                "trainer": {"devices": 4, "strategy": "moefold"},
                "model": {"class_path": "lightning_moefold.recipes.FineTuneModule", "init_args": {"checkpoint": "x"}},
                "data": {"init_args": settings | {"cache_dir": str(tmp_path / "cache")}},
            }
        )
    )
    assert main(["data", "preview", "--config", str(config), "--rows", "-1"]) == 2
    assert capsys.readouterr().err == "moefold data: rows=-1 must be at least 0.\n"
    assert main(["data", "preview", "--config", str(config), "--rows", "1", "--color", colour]) == 0
    shown = capsys.readouterr().out
    two = "⟦Two.<|im_end|>⟧" if colour == "never" else "\033[1;32mTwo.<|im_end|>\033[0m"
    assert two in shown
    assert ("\033" in shown) == (colour == "always")
    assert "a.jsonl:1, document 0: " in shown
    assert "4 rows, of which 4 conversations; 3 documents" in shown
    data = made([file], tokenizer, tmp_path / "cache", 150)
    counts = data.part("train").rows.store.counts
    assert f"labels       {counts.trained} of {counts.tokens} tokens ({counts.trained / counts.tokens:.1%})" in shown
    assert "1 conversations without anything to train on; 0 cut to a row" in shown
    filled = counts.tokens / (len(data.part("train").rows) * 150)
    assert f"{filled:.1%} filled" in shown


@pytest.mark.parametrize("name", ["chat", "dpo"])
def test_configurations_of_the_examples_are_read(name, capsys):
    words = ["fit", "--config", str(ROOT / "examples" / f"{name}.yaml"), "--model.aux_loss", "false", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "aux_loss: false" in shown
    assert "val_fraction: 0.02" in shown


def test_preview_of_wrong_settings_is_one_sentence(tmp_path, capsys):
    words = ["data", "preview", "--data.files", "[nowhere.jsonl]", "--data.tokenizer", str(tmp_path)]
    assert main([*words, "--data.cache_dir", str(tmp_path / "cache")]) == 2
    assert "nowhere.jsonl is no file; give .txt" in capsys.readouterr().err
    stream = [
        "--data",
        "lightning_moefold.recipes.StreamData",
        "--data.files",
        f"[{write(tmp_path / 'a.jsonl', ROWS)}]",
    ]
    assert main(["data", "preview", *stream, "--data.tokenizer", str(tmp_path)]) == 2
    assert "the rows of a stream are made while it is trained on" in capsys.readouterr().err
    assert main([*words, "--part", "middle"]) == 2
    assert "part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1, 2]}, "weights has 2 numbers, but there are 1 files"),
        ({"weights": [-1]}, "at least 0"),
        ({"weights": [0.0]}, "one of them above it"),
        ({"format": "openai"}, "format='openai' is not known; use 'auto' or 'text'"),
        ({"train_on": "user"}, "train_on='user' is not known"),
        ({"processes": 0}, "processes=0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(InputError, match=message):
        TextData(["a.jsonl"], "nowhere", **changes)
