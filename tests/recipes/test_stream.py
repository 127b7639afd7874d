# SPDX-License-Identifier: Apache-2.0
"""Rows that are tokenised while they are read: their order, and where a run goes on."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_moefold.recipes import InputError, StreamData, TextData
from lightning_moefold.recipes.stream import StreamPosition
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.recipes import jobs_run_length as streams
from tests.recipes.chats import TALK, chat_tokenizer, write

TEXTS = [{"text": f"What is {n} and one? " * (1 + n % 5)} for n in range(83)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen2")


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "a.jsonl", TEXTS)


def made(tokenizer: Path, ranks: int = 1, rank: int = 0, batch: int = 4, **changes: Any) -> StreamData:
    data = StreamData(str(tokenizer), sequence_length=64, batch_size=batch, seed=3, buffer=20, **changes)
    data.prepare_data()
    data.setup("fit")
    if ranks > 1:

        class Trainer:
            distributed_sampler_kwargs = {"num_replicas": ranks, "rank": rank}
            lightning_module = torch.nn.Module()

        data.trainer = Trainer()
    return data


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    return [
        tuple(row)
        for row, label in zip(batch["input_ids"].tolist(), batch["labels"], strict=True)
        if (label >= 0).any()
    ]


def test_an_epoch_reads_every_document_once_in_an_order_of_its_own(tokenizer, file, tmp_path):
    whole = TextData(
        [str(file)], str(tokenizer), 64, 4, "documents", val_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    whole.prepare_data()
    whole.setup("fit")
    store = whole.part("train").rows.store
    wanted = sorted(tuple(store.document(n).tokens) for n in range(len(store)))
    loader = made(tokenizer, files=[str(file)]).train_dataloader()
    epochs = []
    for _ in range(2):
        found = []
        for batch in loader:
            for ids, document in zip(batch["input_ids"], batch["document_ids"], strict=True):
                found += [tuple(ids[document == d].tolist()) for d in document.unique() if d >= 0]
        assert sorted(piece[:20] for piece in found if len(piece) < 64) == sorted(p[:20] for p in wanted if len(p) < 64)
        epochs.append(found)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_run_goes_on_under_another_number_of_ranks(tokenizer, file, stop):
    wanted = [row for batch in made(tokenizer, files=[str(file)]).train_dataloader() for row in rows_of(batch)]
    loaders = [made(tokenizer, 2, r, files=[str(file)]).train_dataloader() for r in range(2)]
    seen = []
    iterators = [iter(loader) for loader in loaders]
    for _ in range(stop):
        dealt = [rows_of(next(iterator)) for iterator in iterators]
        seen += [row for pair in zip(*dealt, strict=True) for row in pair]
    assert loaders[0].position() == loaders[1].position()
    rest = made(tokenizer, files=[str(file)], batch=6)
    rest.load_state_dict(asdict(loaders[0].position()))
    seen += [row for batch in rest.train_dataloader() for row in rows_of(batch)]
    assert seen == wanted


def test_ranks_have_as_many_batches_and_rows(tokenizer, file):
    numbers = [
        [len(b["input_ids"]) for b in made(tokenizer, 4, r, files=[str(file)]).train_dataloader()] for r in range(4)
    ]
    assert numbers[0] == numbers[1] == numbers[2] == numbers[3]
    assert set(numbers[0]) == {1}


def test_a_stream_of_datasets(tokenizer, file):
    datasets = pytest.importorskip("datasets")
    source = datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)
    first = [rows_of(b) for b in made(tokenizer, source=source).train_dataloader()]
    assert first == [rows_of(b) for b in made(tokenizer, files=[str(file)]).train_dataloader()]
    rest = made(tokenizer, source=source)
    rest.load_state_dict({"epoch": 0, "block": 2, "rows": 1, "batches": 5})
    plain = made(tokenizer, source=list(TEXTS))
    plain.load_state_dict({"epoch": 0, "block": 2, "rows": 1, "batches": 5})
    assert [rows_of(b) for b in rest.train_dataloader()] == [rows_of(b) for b in plain.train_dataloader()]


def test_conversations_and_small_blocks(tokenizer, tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": TALK[:3]}]
    data = StreamData(str(tokenizer), source=rows, buffer=1, sequence_length=256, batch_size=2)
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert [(labels >= 0).any().item() for labels in batch["labels"]] == [True, True]
    text = write(tmp_path / "b.jsonl", [{"text": "one"}])
    short = StreamData(str(tokenizer), [str(text)], packing="blocks", sequence_length=64)
    short.setup("fit")
    with (
        pytest.warns(UserWarning, match="block 0 of the stream is left out: the text has"),
        pytest.raises(InputError, match="no block of buffer=10000 rows fills a row of 64 tokens; give a larger buffer"),
    ):
        list(short.train_dataloader())


def test_what_a_stream_leaves_out_is_told_once(tokenizer):
    long = [{"role": "user", "content": "What? " * 200}, TALK[2]]
    source = [{"messages": long if n % 2 else TALK[1:3]} for n in range(8)]
    data = StreamData(str(tokenizer), source=source, buffer=4, sequence_length=100, batch_size=2)
    data.setup("fit")
    with pytest.warns(UserWarning, match="conversations") as seen:
        list(data.train_dataloader())
    told = [str(w.message) for w in seen if "conversations" in str(w.message)]
    assert [line.split(". ")[0] for line in told] == [
        "block 0 of the stream: of 4 conversations, 2 left out, as nothing of their first 100 tokens is trained on"
    ]


def test_an_epoch_that_is_cut_short_is_followed_by_the_rows_after_it(tokenizer, file):
    wanted = [rows_of(batch) for batch in made(tokenizer, files=[str(file)]).train_dataloader()]
    data = made(tokenizer, files=[str(file)])
    loader = data.train_dataloader()
    size = len(wanted)
    seen = [rows_of(batch) for _ in range(-(-size // 3)) for batch in islice(loader, 3)]
    assert seen[:size] == wanted
    # Of batches taken ahead, only those count that were trained on, those of a loader made anew as well.
    trained = 5  # of an epoch before
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace())))
    data.trainer = SimpleNamespace(
        fit_loop=loop, overfit_batches=0, distributed_sampler_kwargs=None, lightning_module=torch.nn.Module()
    )
    data._stream, loop.epoch_loop.batch_progress.total.processed = None, trained
    seen = []
    for anew in (False, False, True):
        if anew or not seen:
            loader = data.train_dataloader()
        ahead = [rows_of(batch) for batch in islice(loader, 6)]
        seen += ahead[:2]
        loop.epoch_loop.batch_progress.total.processed += 2
    assert seen == wanted[:6]
    rest = made(tokenizer, files=[str(file)])
    rest.load_state_dict(data.state_dict())
    assert [rows_of(batch) for batch in rest.train_dataloader()] == wanted[6:]
    data.trainer.overfit_batches = 2
    loader = data.train_dataloader()
    for _ in range(2):
        assert [rows_of(batch) for batch in islice(loader, 2)] == wanted[:2]
        loop.epoch_loop.batch_progress.total.processed += 2


def test_a_stream_does_not_go_on_in_the_middle_under_another_order(tokenizer, file):
    data = made(tokenizer, files=[str(file)])
    loader = data.train_dataloader()
    list(islice(loader, 2))
    other = made(tokenizer, files=[str(file)])
    other.seed = 4
    other.load_state_dict(data.state_dict())
    with pytest.raises(
        InputError, match=r"in the middle of an epoch of data with seed=3, and this run has seed=4, so rows"
    ):
        other.train_dataloader()
    list(loader)  # at the end of the epoch, any order follows
    other.load_state_dict(data.state_dict())
    assert other.train_dataloader().position() == StreamPosition(1)


def test_any_seed_draws_an_order(tokenizer):
    data = StreamData(str(tokenizer), source=TEXTS, seed=20240601, sequence_length=64)
    data.setup("fit")
    assert rows_of(next(iter(data.train_dataloader())))


def test_files_and_template_are_checked_before_the_first_batch(tokenizer, file, tmp_path):
    (tmp_path / "bad.csv").write_text("a,b")
    with pytest.raises(InputError, match="bad.csv is not read"):
        StreamData(str(tokenizer), [str(file), str(tmp_path / "bad.csv")]).setup("fit")
    with pytest.raises(InputError, match="a directory without a dataset"):
        StreamData(str(tokenizer), [str(file), str(tmp_path)]).setup("fit")
    with pytest.raises(InputError, match=r"nowhere.jinja cannot be read"):
        StreamData(str(tokenizer), [str(file)], chat_template=str(tmp_path / "nowhere.jinja")).setup("fit")
    plain = chat_tokenizer(tmp_path / "plain", None)
    with pytest.raises(InputError, match="has no chat template"):
        StreamData(str(plain), [str(file)], format="messages").setup("fit")
    StreamData(str(plain), [str(file)]).setup("fit")


def test_a_stream_without_rows_to_evaluate_says_so(tokenizer, file):
    data = made(tokenizer, files=[str(file)])
    assert data.val_dataloader() == []
    for loader, name in ((data.test_dataloader, "test"), (data.predict_dataloader, "predict")):
        with pytest.raises(
            InputError, match=f"no text to {name} on, as a stream has no rows of its own .* give val_files"
        ):
            loader()
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING), lightning_module=torch.nn.Module())
    with pytest.raises(InputError, match="no text to validate on"):
        data.val_dataloader()
    with pytest.raises(InputError, match="made while it is trained on"):
        data.part("train")


@pytest.mark.more
def test_a_trainer_goes_on_with_the_first_row_not_trained_on(pool: RankPool, tokenizer, tmp_path):
    """Lightning takes a batch ahead where there is no length."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "mixtral", vocab_size=420)
    short = write(tmp_path / "short.jsonl", TEXTS[:30])  # four batches, of which the last has two rows
    common = {"path": str(checkpoint), "tokenizer": str(tokenizer), "file": str(short)}
    [whole] = pool.run(streams.streamed, **common, fold="", steps=10, ranks=1)
    assert [len(rows) for rows in whole] == [4, 4, 4, 2, 4, 4, 4, 2, 4, 4]
    for stop in (3, 4):  # with the last batch taken ahead, and at the end of the epoch
        folder = tmp_path / str(stop)
        first = pool.run(streams.streamed, **common, fold="| ep2", steps=stop, save=str(folder), ranks=2)
        assert [sorted(a + b) for a, b in zip(*first, strict=True)] == [sorted(rows) for rows in whole[:stop]]
        [rest] = pool.run(
            streams.streamed, **common, fold="", steps=10, resume=str(folder / f"step={stop}.ckpt"), ranks=1
        )
        assert rest == whole[stop:]


def test_wrong_settings(tokenizer, tmp_path):
    for changes, message in [
        ({}, "either files or a source"),
        ({"files": ["a"], "source": [1]}, "either files or a source"),
        ({"source": iter([1])}, "can be read only once"),
        ({"source": [{}], "buffer": 0}, "buffer=0"),
    ]:
        with pytest.raises(InputError, match=message):
            StreamData(str(tokenizer), **changes)
    with pytest.raises(InputError, match=r"nowhere.jsonl is no file"):
        StreamData(str(tokenizer), [str(tmp_path / "nowhere.jsonl")]).setup("fit")
    data = StreamData(str(tokenizer), source=[{"nothing": 1}])
    data.setup("fit")
    with pytest.raises(InputError, match="source, row 1 is not a JSON object"):
        list(data.train_dataloader())
