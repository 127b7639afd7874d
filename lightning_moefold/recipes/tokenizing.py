# SPDX-License-Identifier: Apache-2.0
"""Files as tokenised documents, by several processes where there is much to do.

A text begins as the tokenizer begins one (with a begin-of-text token, say) and is closed by its end-of-text token; a
conversation is what its chat template makes of it (:mod:`.template`). Rows are dealt to the processes in chunks, and their
documents are joined in the order of the rows: the result does not depend on how many processes there are.

They are started as commands of their own: forked ones would inherit the threads of a training process, and spawned ones would
run the user's script again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.recipes.conversation import Conversation, Format, read_feedback, read_preference, read_row
from lightning_moefold.recipes.documents import Raw, dataset_files, name_of, read_rows
from lightning_moefold.recipes.store import Counts, StoreWriter
from lightning_moefold.recipes.template import ChatTemplate, Document, Kind, TrainOn, read_template

_CHUNK = 512  # rows
_ENOUGH = 16 << 20  # bytes for which a process is worth its start


@dataclass(frozen=True)
class Reading:
    """What the tokens of files depend on besides the files.

    Args:
        tokenizer: Directory with a tokenizer of ``transformers``; if it holds a config.json as well, tokens are checked
            against its vocabulary.
        add_special_tokens: Whether texts begin (and end) with the tokens that the tokenizer adds by itself.
        trust_remote_code: Whether Python code that comes with the tokenizer may be run.
        form: How rows are spelled.
        train_on: What of conversations is trained on.
        chat_template: A file of jinja in place of the tokenizer's own template.
        template_options: Further values that the template reads.
    """

    tokenizer: str
    add_special_tokens: bool = True
    trust_remote_code: bool = False
    form: Format | Literal["preference", "feedback"] = "auto"
    train_on: TrainOn = "assistant"
    chat_template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)


class Encoder:
    """Makes documents of rows.

    Args:
        reading: How.

    Raises:
        InputError: If the tokenizer cannot be loaded.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        try:
            self.tokenizer = load_tokenizer(Path(reading.tokenizer), reading.trust_remote_code)
        except CheckpointError as error:
            raise InputError(str(error)) from error.__cause__
        self._added = list(self.tokenizer("", add_special_tokens=reading.add_special_tokens)["input_ids"])

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            InputError: If there is none.
        """
        reading, template = self.reading, read_template(self.reading.chat_template)
        return ChatTemplate(self.tokenizer, reading.tokenizer, template, reading.template_options, reading.train_on)

    def encode(self, found: Any, name: str, where: str) -> list[Document]:
        """The documents of a row; two of a preference, or none.

        Args:
            found: The object of the row, or a string for a text.
            name: What the row is called in output.
            where: File and place.

        Raises:
            InputError: If it cannot be trained on.
        """
        form = self.reading.form
        if form == "preference":
            both = [self._answer(talk, where) for talk in read_preference(found, where)]
            kept = [one for one in both if one is not None]
            if len(kept) == 2 and kept[0].tokens == kept[1].tokens:
                raise InputError(f"{where}: the chat template makes the same text of both answers; leave the row out.")
            return kept if len(kept) == 2 else []
        if form == "feedback":
            talk, desired = read_feedback(found, where)
            answer = self._answer(talk, where)
            return [] if answer is None else [answer if desired else answer._replace(kind=Kind.UNDESIRED)]
        row = read_row(found, where, form)
        if isinstance(row, Conversation):
            return self.template.encode(row, where)
        return [Document(self._encode_text(row, name))]

    def _answer(self, talk: Conversation, where: str) -> Document | None:
        """An answer with what asks for it, as one document; None if nothing of it is trained on."""
        documents = self.template.encode(talk, where)
        if len(documents) > 1:
            raise InputError(
                f"{where}: the chat template writes earlier turns of an answer otherwise than the last, so that it is no single "
                "text; give answers of one turn."
            )
        return documents[0] if documents else None

    def _encode_text(self, text: str, name: str) -> list[int]:
        """Begun as the tokenizer begins a text, and closed by the end-of-text token, each once; nothing of an empty one."""
        if not text:
            return []  # there is nothing to learn in an end of text alone
        tokenizer, add = self.tokenizer, self.reading.add_special_tokens
        try:
            tokens = list(tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"])
        except (TypeError, UnicodeError):  # half of a surrogate pair, which JSON can spell
            raise InputError(f"{name} holds characters that are no Unicode text; remove them.") from None
        begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        if self._added[:1] == begin and tokens[:2] == begin * 2:
            del tokens[0]  # the text has its own
        if self._added[-1:] == end and tokens[-2:] == end * 2:
            del tokens[-1]
        return tokens if end == [None] or tokens[-1:] == end else tokens + end


def tokenize(files: Sequence[Path], reading: Reading, folder: Path, processes: int | None = None) -> Counts:
    """Writes the documents of files to a folder, with a bar in a terminal that counts rows.

    Args:
        files: What is read.
        reading: How.
        folder: For a :class:`~.store.TokenStore`.
        processes: How many do it; by default one for every processor and 16 MB of the files.

    Raises:
        InputError: If files, tokenizer or rows are not usable.
    """
    from tqdm.auto import tqdm

    if processes is None:
        size = sum(part.stat().st_size for file in files for part in dataset_files(file))
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = max(1, min(processors, size // _ENOUGH))
    writer = StoreWriter(folder)
    with tqdm(desc="tokenising", unit=" rows", disable=None, leave=False) as bar:
        if processes == 1:
            encoder = Encoder(reading)
            for raw in read_rows(files):
                _add(writer, encoder, files, raw)
                bar.update()
        else:
            _share(files, reading, writer, processes, bar.update)
    check_vocabulary(reading, writer.counts.largest)
    if not writer.counts.documents:
        raise InputError(
            f"nothing of the {writer.counts.rows} rows of {', '.join(map(str, files))} is trained on; "
            "texts must not be empty, and conversations need a turn of an assistant that answers another."
            if writer.counts.rows
            else f"{', '.join(map(str, files))} holds no row; give files with text."
        )
    writer.close()
    return writer.counts


def _add(writer: StoreWriter, encoder: Encoder, files: Sequence[Path], raw: Raw) -> None:
    found = raw.read()
    documents = encoder.encode(found, name_of(files[raw.file], raw.number), raw.where)
    # A row of which nothing is trained on is a conversation: texts are trained on as a whole.
    chat = not isinstance(found, str) and (not documents or documents[0].kind != Kind.TEXT)
    writer.add([d for d in documents if d.tokens], raw.file, raw.number, chat)


def check_vocabulary(reading: Reading, largest: int) -> None:
    """Refuses tokens that the model beside the tokenizer does not have.

    Raises:
        InputError: If ``largest`` is one.
    """
    size = _vocabulary(Path(reading.tokenizer) / "config.json")
    if size is not None and largest >= size:
        raise InputError(
            f"the tokenizer of {reading.tokenizer} gives token {largest}, but the model has only {size} tokens; enlarge it with "
            f"transformers: load it, resize_token_embeddings({largest + 1}) or more, save_pretrained to another directory."
        )


def _vocabulary(config: Path) -> int | None:
    """``vocab_size`` of a model of any kind; None where it is not known."""
    try:
        size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


# ---- several processes -----------------------------------------------------------------------------------------------


def _share(
    files: Sequence[Path], reading: Reading, writer: StoreWriter, processes: int, advance: Callable[[int], Any]
) -> None:
    """Has processes tokenise, and joins what they wrote, chunk by chunk."""
    with tempfile.TemporaryDirectory(dir=writer.folder, prefix=".parts") as parts:
        job = {"files": list(map(str, files)), "reading": asdict(reading), "processes": processes}
        logs = [Path(parts, f"{number}.log") for number in range(processes)]
        started = [_start(job | {"number": n, "folder": f"{parts}/{n}"}, logs[n]) for n in range(processes)]
        errors: dict[int, str] = {}

        def watch(number: int) -> None:
            for line in started[number].stdout or ():
                if line.strip().isdigit():  # anything else was printed by code that is not ours
                    advance(int(line))
            if started[number].wait():
                errors[number] = logs[number].read_text(encoding="utf-8", errors="replace").strip()

        threads = [threading.Thread(target=watch, args=(number,)) for number in range(processes)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for process in started:
                process.kill()
        if errors:
            _raise(list(errors.values()))
        _join(parts, writer, processes)


def _start(job: dict[str, Any], log: Path) -> subprocess.Popen[str]:
    there = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, there)), "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "lightning_moefold.recipes.tokenizing", json.dumps(job)]
    with log.open("wb") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace", env=environment
        )


def _raise(errors: list[str]) -> None:
    """The error of the earliest row, or what a process that broke has printed."""
    lines = [error.splitlines()[-1] if error else "" for error in errors]
    known = [json.loads(line) for line in lines if line.startswith('{"chunk"')]
    if known:
        raise InputError(min(known, key=lambda one: one["chunk"])["message"])
    raise RuntimeError(f"a process that tokenises has ended: {errors[0][-2000:]}")


def _join(parts: str, writer: StoreWriter, processes: int) -> None:
    readers = [_chunks(Path(parts, str(number))) for number in range(processes)]
    chunk = 0
    while (found := next(readers[chunk % processes], None)) is not None:
        writer.append(Path(parts, str(chunk % processes)), *found)
        chunk += 1
    ends = [Path(parts, str(number), "end") for number in range(processes)]  # each reads all rows, and counts them
    if {end.read_text() if end.is_file() else "" for end in ends} != {str(writer.counts.rows)}:
        raise RuntimeError(
            f"a process that tokenises has ended before its last row: {writer.counts.rows} rows were written; start again."
        )


def _chunks(folder: Path) -> Iterator[tuple[Counts, slice, slice]]:
    """Counts, documents and tokens of each chunk that a process has written."""
    document = token = 0
    with (folder / "chunks.jsonl").open() as file:
        for line in file:
            counts = Counts(**json.loads(line))
            documents = slice(document, document := document + counts.documents)
            yield counts, documents, slice(token, token := token + counts.tokens)


def _work(job: dict[str, Any]) -> None:
    """What one of the processes does."""
    files = [Path(file) for file in job["files"]]
    folder, number, processes = Path(job["folder"]), job["number"], job["processes"]
    chunk, before = 0, Counts()
    try:
        encoder, writer = Encoder(Reading(**job["reading"])), StoreWriter(folder)
        with (folder / "chunks.jsonl").open("w") as marks:

            def mark() -> None:
                nonlocal before
                now = writer.counts
                gained = {k: v - before.__dict__[k] * (k != "largest") for k, v in asdict(now).items()}
                marks.write(json.dumps(gained) + "\n")
                before = Counts(**asdict(now))
                print(gained["rows"], flush=True)

            index = -1
            for index, raw in enumerate(read_rows(files)):
                chunk = index // _CHUNK
                if chunk % processes == number:
                    _add(writer, encoder, files, raw)
                    if index % _CHUNK == _CHUNK - 1:
                        mark()
            if writer.counts.rows > before.rows:
                mark()
        writer.close()
        (folder / "end").write_text(str(index + 1))
    except InputError as error:
        print(json.dumps({"chunk": chunk, "message": str(error)}), file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
