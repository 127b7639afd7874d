# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a large file of texts and conversations: tokenised, packed, and dealt out.

    python benchmarks/data.py --rows 1000000

Memory is what the process itself holds (RssAnon, at its peak, above what it held after its imports). Pages of mapped files are
not counted, as the kernel takes them back when it likes.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from lightning_moefold.recipes import TextData
from tests.recipes.chats import chat_tokenizer

WORDS = """what is one and two or three I think so add them all please answer is no yes""".split()  # noqa: SIM905


def make_file(path: Path, rows: int, chats: float) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            asked, said = (" ".join(draw.choices(WORDS, k=draw.randint(3, 20))) for _ in range(2))
            if draw.random() > chats:
                file.write(json.dumps({"text": f"{asked}? {said}."}) + "\n")
                continue
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": talk}) + "\n")


def held() -> int:
    """Bytes of this process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is not known here")


class Peak:
    """The most memory that is held within a ``with`` block."""

    def __enter__(self) -> Peak:
        self.start = self.most = held()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._begun = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.most = max(self.most, held())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._done.set()
        self._thread.join()

    def __str__(self) -> str:
        return f"{(self.most - self.start) / 1e6:7.0f} MB   {self.seconds:6.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--chats", type=float, default=0.05, help="share of conversations; the others are texts")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--batches", type=int, default=2_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = chat_tokenizer(folder / "tokenizer", "qwen2")
        make_file(folder / "chats.jsonl", args.rows, args.chats)
        size = (folder / "chats.jsonl").stat().st_size
        data = TextData(
            [str(folder / "chats.jsonl")], str(tokenizer), 1024, 8, cache_dir=str(folder / "cache"),
            processes=args.processes,
        )  # fmt: skip
        print(f"{args.rows:,} rows, {size / 1e6:,.0f} MB", flush=True)
        with Peak() as first:
            data.prepare_data()
            data.setup("fit")
        print(f"tokenised and packed   {first}", flush=True)
        again = TextData([str(folder / "chats.jsonl")], str(tokenizer), 1024, 8, cache_dir=str(folder / "cache"))
        with Peak() as second:
            again.prepare_data()
            again.setup("fit")
        print(f"found again            {second}", flush=True)
        with Peak() as third:
            for number, _ in enumerate(again.train_dataloader()):
                if number == args.batches:
                    break
        print(f"{number:,} batches          {third}", flush=True)
        print(f"{len(again.part('train')):,} rows of 1,024 tokens")


if __name__ == "__main__":
    main()
