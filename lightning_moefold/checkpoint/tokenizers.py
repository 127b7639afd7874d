# SPDX-License-Identifier: Apache-2.0
"""Tokenizers beside checkpoints: which files they consist of, and how they are loaded.

Tokenizers are loaded by ``transformers``, from local files only. A tokenizer's own code runs only if the caller allows
it; nothing ever asks at a terminal.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from lightning_moefold.errors import CheckpointError

_PATTERNS = (
    "*token*", "vocab*", "merges*", "*.model", "*.vocab", "*.bpe", "*.tiktoken", "tekken.json",
    "chat_template*", "additional_chat_templates", "*.jinja",
)  # fmt: skip
#: The package that reads such a file if there is no tokenizer.json: file pattern, module, package.
_SENTENCEPIECE = ("*.model", "sentencepiece", "sentencepiece")
_READERS = (
    _SENTENCEPIECE,
    ("*.tiktoken", "tiktoken", "tiktoken"),
    ("tekken.json", "mistral_common", "mistral-common"),
)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file or folder of this name belongs to a tokenizer; chat templates do."""
    return any(Path(name).match(pattern) for pattern in _PATTERNS)


def tokenizer_files(directory: Path) -> list[Path]:
    """Returns the files of a tokenizer of any kind, without its chat templates."""
    found = {path for pattern in _PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".jinja")


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer in a directory.

    Args:
        directory: Directory with the tokenizer's files.
        trust_remote_code: Whether Python code among these files may run.

    Raises:
        CheckpointError: If there is no tokenizer, or it cannot be loaded; the message says which package or setting is
            missing.
    """
    try:
        from transformers import AutoTokenizer  # imported here, because few ranks need it and it takes seconds
    except ImportError:
        raise CheckpointError(
            "text is tokenised by transformers, which is not installed; pip install transformers."
        ) from None
    if not tokenizer_files(directory):
        # For a directory with only a model, transformers invents a tokenizer without any token.
        raise CheckpointError(f"{directory} holds no tokenizer that transformers can load.")
    if _own_code(directory) is None and not list(directory.glob("vocab*")):
        _need(directory, _SENTENCEPIECE)  # without it, transformers tries other readers and prints warnings
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _reason(directory, error, trust_remote_code) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers also invents one from the name of its class.
        raise CheckpointError(f"the tokenizer of {directory} has no vocabulary; its files are not complete.")
    return tokenizer


def _need(directory: Path, reader: tuple[str, str, str]) -> None:
    """Raises a CheckpointError if a file needs a package that is not installed, and there is no tokenizer.json."""
    pattern, module, package = reader
    found = sorted(directory.glob(pattern))
    if found and not (directory / "tokenizer.json").is_file() and importlib.util.find_spec(module) is None:
        raise CheckpointError(f"{found[0]} is read by {package}, which is not installed; pip install {package}.")


def _reason(directory: Path, error: Exception, trusted: bool) -> CheckpointError:
    code = _own_code(directory)
    if code is not None and not trusted:
        return CheckpointError(
            f"the tokenizer of {directory} is Python code of its own ({code}), which is run only with "
            "trust_remote_code=True; read it before."
        )
    try:
        for reader in _READERS:
            _need(directory, reader)
    except CheckpointError as missing:
        return missing
    said = " ".join(str(error).split())
    return CheckpointError(
        f"{directory} holds no tokenizer that transformers can load ({type(error).__name__}: {said[:200]})."
    )


def has_own_code(directory: Path) -> bool:
    """Whether a tokenizer uses a Python class from its own files."""
    return _own_code(directory) is not None


def end_token(directory: Path) -> int | None:
    """Returns the id of the end-of-text token if the tokenizer's files state it, without loading the tokenizer."""
    try:
        end = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        added = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        text = end["content"] if isinstance(end, dict) else end
        return next((int(token["id"]) for token in added if token["content"] == text), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_code(directory: Path) -> str | None:
    """Returns the name of the tokenizer's own Python class, if it has one."""
    try:
        classes = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["auto_map"]
        classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
        return next((str(name) for name in reversed(classes or ()) if name), None)  # prefers the fast one
    except (OSError, ValueError, KeyError, TypeError):
        return None
