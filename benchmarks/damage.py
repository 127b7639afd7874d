# SPDX-License-Identifier: Apache-2.0
"""Damaged files, through each reader: no crash, no hang, no wrong load.

    python benchmarks/damage.py [--cases 1000] [--minutes 20] [--readers hf training ...] [--seed 0]

A case damages one file of a directory that has been read well before: it flips bits, cuts bytes off or out, zeroes or inserts
some, exchanges two ranges or removes the file; of a configuration it may also give a field a value of another kind. What then
happens is one of these:

    refused     an error of this package, in one sentence
    same        what is read is what was saved (the damage lies where nothing is read from)
    noticed     something else is read, and a warning says that the file was changed
    other       another configuration or text that is as good as the first: nothing could say that it was damaged
    WRONG       something else is read without a word
    CRASH       any other error, or the end of the process
    HANG        no end within a minute

Exit status 0 if there are none of the last three. Cases run in children of this process, two hundred in each, in memory where the
system has a place for files there; readers take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.balance.trace import read_trace
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.checkpoint.chunks import TensorPiece
from lightning_moefold.checkpoint.sharded import MODELS, load_meta, pack, save_sharded
from lightning_moefold.errors import MoEFoldError
from lightning_moefold.layout import Box
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.export import export
from lightning_moefold.testing import make_checkpoint

FAULTS = ("WRONG", "CRASH", "HANG")
_BATCH, _SECONDS = 200, 60
#: Values of other kinds, for fields of a configuration.
_ODD: tuple[Any, ...] = (
    {}, {"a": 1}, [], [1], ["x"], [{}], "", "x\0y", "1e5", -1, 0, 1, 10**30, 0.5, float("nan"), float("inf"), True, False, None,
    "torch.\0",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader and what it reads.

    Args:
        make: Makes the files in an empty directory.
        read: Reads a directory; returns what came out, by name.
        strict: Whether any other result than the first is wrong.
        odd: Name of a JSON file whose fields are also given odd values.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Mapping[str, Any]]
    strict: bool = True
    odd: str = ""


def _model(folder: Path) -> None:
    source = make_checkpoint(folder.parent / f"source-{folder.name}", "qwen2_moe", num_hidden_layers=1, num_experts=2)
    MoECausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size=60_000)


def _read_model(folder: Path) -> Mapping[str, Any]:
    model = MoECausalLM.from_pretrained(folder)
    return {"config": repr(model.config), **model.state_dict()}


def _unsummed(folder: Path) -> None:
    _model(folder)
    (folder / "checksums.json").unlink()


def _training(folder: Path) -> None:
    """A checkpoint as a run saves it: weights, two states of the optimizer, and the description of the model."""
    source = make_checkpoint(folder.parent / "source-training", "qwen3_moe", num_hidden_layers=1, num_experts=2)
    model = MoECausalLM.from_pretrained(source)
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        stacked = parameter.dim() == 3
        for prefix, suffix in (
            ("model.model.", ""),
            ("optimizer.0.model.", ".exp_avg"),
            ("optimizer.0.model.", ".exp_avg_sq"),
        ):
            value = parameter.detach() if not suffix else torch.rand_like(parameter)
            boxes, shape = (Box.whole(value.shape),), tuple(value.shape)
            tensors[f"{prefix}{name}{suffix}"] = TensorPiece(value, boxes, shape, stacked=stacked)
    meta = {
        MODELS: {"model": model.describe()},
        "epoch": 3,
        "global_step": 1000,
        "fold": "",
        "hyper_parameters": {"lr": 1e-3},
    }
    save_sharded(pack(folder, meta, SINGLE), tensors, SINGLE)


def _read_training(folder: Path) -> Mapping[str, Any]:
    meta = load_meta(folder)
    stored = StoredTensors(folder, meta)
    return {"meta": repr(meta), **{name: stored.read(name) for name in sorted(stored.items)}}


def _read_exported(folder: Path) -> Mapping[str, Any]:
    out = folder.with_name("exported")
    shutil.rmtree(out, ignore_errors=True)
    export(folder, out)
    return _read_model(out)


def _config(folder: Path) -> None:
    source = make_checkpoint(folder.parent / "source-config", random.choice(["mixtral", "qwen2_moe", "qwen3_moe"]))
    folder.mkdir()
    shutil.copy(source / "config.json", folder)


def _read_config(folder: Path) -> Mapping[str, Any]:
    return {"config": repr(MoEConfig.from_pretrained(folder))}


def _text_data(folder: Path) -> Any:
    from lightning_moefold.recipes import TextData

    source = folder.parent / "source-cache"
    return TextData(
        tokenizer=str(source / "tokenizer"), files=[str(source / "a.txt"), str(source / "b.txt")], cache_dir=str(folder),
        sequence_length=16,
    )  # fmt: skip


def _cache(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.recipes.chats import chat_tokenizer

    source = folder.parent / "source-cache"
    source.mkdir()
    chat_tokenizer(source / "tokenizer", None)
    draw = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (source / name).write_text(" ".join(draw.choice(["text", "user", "hello", "system"]) for _ in range(2000)))
    _text_data(folder).tokenize()


def _read_cache(folder: Path) -> Mapping[str, Any]:
    rows, packing, _ = _text_data(folder)._rows("train")
    taken = rows.take(range(len(rows)))
    return {"packing": packing, **taken._asdict()}


def _trace(folder: Path) -> None:
    folder.mkdir()
    counts = np.random.default_rng(0).integers(0, 99, (5, 2, 2, 4))
    np.savez_compressed(folder / "a.npz", counts=counts, iterations=np.arange(5))
    np.savez(folder / "ids.npz", expert_ids=np.random.default_rng(0).integers(0, 8, (300, 2, 2)))
    (folder / "b.json").write_text(json.dumps({"counts": counts.sum(2).tolist()}))
    with (folder / "c.jsonl").open("w") as file:
        for step in range(4):
            for layer in range(2):
                file.write(
                    json.dumps({"step": step, "layer": layer, "top_indices": [[0, 1], [2, 3], [step, 3]]}) + "\n"
                )


def _read_traces(folder: Path) -> Mapping[str, Any]:
    return {name: pickle.dumps(read_trace(folder / name)) for name in ("a.npz", "ids.npz", "b.json", "c.jsonl")}


READERS = {
    "hf": Reader(_model, _read_model, odd="config.json"),
    "hf without checksums": Reader(_unsummed, _read_model, strict=False, odd="config.json"),
    "training": Reader(_training, _read_training),
    "export": Reader(_training, _read_exported),
    "config": Reader(_config, _read_config, strict=False, odd="config.json"),
    "cache": Reader(_cache, _read_cache),
    "trace": Reader(_trace, _read_traces, strict=False),
}


def damage(folder: Path, draw: random.Random, odd: str) -> str:
    """Damages one file; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = draw.choice(files)
    if odd and draw.random() < 0.3:
        raw = json.loads((folder / odd).read_text())
        name = draw.choice(sorted(raw))
        raw[name] = draw.choice(_ODD)
        (folder / odd).write_text(json.dumps(raw))
        return f"{name}={raw[name]!r}"
    content = bytearray(file.read_bytes())
    size = len(content)
    what = draw.choice(["flip", "flip", "flip some", "cut off", "cut out", "zero", "insert", "exchange", "remove"])
    a = draw.randrange(size) if size else 0
    length = min(draw.choice([1, 2, 8, 64, 4096]), size - a)
    if what.startswith("flip") and size:
        for _ in range(1 if what == "flip" else 8):
            content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif what == "cut off":
        del content[a:]
    elif what == "cut out":
        del content[a : a + length]
    elif what == "zero":
        content[a : a + length] = bytes(length)
    elif what == "insert":
        content[a:a] = draw.randbytes(draw.choice([1, 8, 64]))
    elif what == "exchange" and length:
        b = draw.randrange(size - length + 1)
        content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]
    file.unlink()
    if what != "remove":
        file.write_bytes(content)
    return f"{what} in {file.relative_to(folder)} at {a}, {length} bytes"


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return set(a) == set(b) and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else repr(a[name]) == repr(b[name])
        for name in a
    )


def judge(reader: Reader, folder: Path, good: Mapping[str, Any]) -> tuple[str, str]:
    """Reads a damaged directory; returns what happened, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = reader.read(folder)
        except MoEFoldError as error:
            text = str(error)
            return ("refused" if "\n" not in text and len(text) < 1000 else "CRASH"), f"{type(error).__name__}: {text}"
        except Exception as error:
            return "CRASH", f"{type(error).__name__}: {error}"
    if _same(found, good):
        return "same", ""
    if any("is not the one that was exported" in str(warning.message) for warning in said):
        return "noticed", ""
    return ("WRONG" if reader.strict else "other"), ""


def _work(name: str, seeds: range, source: Path, pipe: Connection) -> None:
    reader = READERS[name]
    good = reader.read(source)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            copy = Path(scratch, "copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
            done = damage(copy, random.Random(f"{name} {seed}"), reader.odd)
            pipe.send((seed, "CRASH", done, "the process ended"))  # replaced by what follows, if anything does
            outcome, said = judge(reader, copy, good)
            pipe.send((seed, outcome, done, said))
    pipe.close()


def _batch(name: str, seeds: range, source: Path) -> list[tuple[int, str, str, str]]:
    """Runs cases in a child; one that ends it, or in which it hangs, is the last that it has told of."""
    results: dict[int, tuple[int, str, str, str]] = {}
    while len(results) < len(seeds):
        left = range(seeds.start + len(results), seeds.stop)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(
            target=_work, args=(name, left, source, theirs), daemon=True
        )
        child.start()
        theirs.close()
        hangs = False
        try:
            while True:
                if not ours.poll(_SECONDS):
                    hangs = True
                    os.kill(child.pid or 0, signal.SIGKILL)
                    break
                seed, outcome, done, said = ours.recv()
                results[seed] = (seed, outcome, done, said)
        except EOFError:
            pass
        child.join()
        if hangs and results:
            last = max(results)
            results[last] = (last, "HANG", *results[last][2:])
        if not results:
            raise SystemExit(f"the reader {name} does not read what is whole")
    return [results[seed] for seed in sorted(results)]


def run(names: list[str], cases: int, seed: int, minutes: float, folder: Path) -> dict[str, Counter[str]]:
    """Runs ``cases`` of each reader, or as many as the time allows; prints faults as they come."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    seconds = dict.fromkeys(names, 0.0)
    begin = time.monotonic()
    for name in names:
        random.seed(seed)
        READERS[name].make(folder / name)
    for first in range(seed, seed + cases, _BATCH):
        for name in names:
            if time.monotonic() - begin > 60 * minutes:
                break
            start = time.monotonic()
            for number, outcome, done, said in _batch(
                name, range(first, min(first + _BATCH, seed + cases)), folder / name
            ):
                counts[name][outcome] += 1
                if outcome in FAULTS:
                    print(f"{name}, case {number}: {outcome} after {done}: {said}", flush=True)
            seconds[name] += time.monotonic() - start
            told = ", ".join(f"{outcome} {count}" for outcome, count in counts[name].most_common())
            print(f"{name}: {counts[name].total()} cases in {seconds[name]:.0f} s: {told}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each reader")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further cases are begun")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if Path("/dev/shm").is_dir():
        tempfile.tempdir = "/dev/shm"
    with tempfile.TemporaryDirectory() as folder:
        counts = run(arguments.readers, arguments.cases, arguments.seed, arguments.minutes, Path(folder))
    return 1 if any(count[fault] for count in counts.values() for fault in FAULTS) else 0


if __name__ == "__main__":
    sys.exit(main())
