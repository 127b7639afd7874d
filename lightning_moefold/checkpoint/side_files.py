# SPDX-License-Identifier: Apache-2.0
"""Side files: the files of a model besides its weights, such as tokenizer, templates, code, generation settings, license.

An export copies all files of the model's directory, except those that it writes itself (weights, index, config.json)
and those that describe another form of the model. A tokenizer from another directory replaces all tokenizer files of
the model, since a mixture of two tokenizers' files would be read as a third one.
"""

from __future__ import annotations

import filecmp
import json
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_moefold.checkpoint.sums import CHECKSUMS
from lightning_moefold.checkpoint.tokenizers import end_token, has_own_code, is_tokenizer_file

_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.gguf", "*.ggml", "*.msgpack", "*.h5", "*.onnx",
    "*.onnx_data", "*.tflite", "*.npz", "*.llamafile",
)  # fmt: skip
#: Checksums and configurations of the model, in Hugging Face's and in Mistral's format, and of adapters, which are not read.
_CONFIGS = (CHECKSUMS, "config.json", "params.json", "adapter_config.json", "*.index.json")
#: Files that an earlier export, of any model, may have left in a directory that is to be replaced.
_OF_AN_EXPORT = (
    CHECKSUMS, "config.json", "model.safetensors.index.json", "*.safetensors", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "spiece.model", "*.tiktoken", "tokenization_*.py",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "preprocessor_config.json",
)  # fmt: skip


def side_files(directory: Path) -> dict[str, Path]:
    """Returns the files of a model's directory that an export copies, by relative name.

    Hidden files do not belong to the model, and a folder with weights in it is another model.
    """
    found = {}
    for path in sorted(directory.iterdir()):
        if path.is_file():
            inside = [path]
        elif path.is_dir() and not path.is_symlink():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            if any(_matches(file.name, _WEIGHTS) for file in inside):
                continue
        else:
            continue
        for file in inside:
            name = file.relative_to(directory).as_posix()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)
            if not hidden and not _matches(name, _WEIGHTS + _CONFIGS):
                found[name] = file
    return found


def files_to_carry(model: Path | None, tokenizer: Path | None) -> dict[str, Path]:
    """Returns the files that an export copies beside its weights, by relative name.

    Without a directory for the tokenizer that was used in training, the model's is taken.
    """
    carried = _existing(model, "tokenizer and other files beside the weights")
    if tokenizer is None or not are_apart(model, tokenizer):
        return carried
    others = _existing(tokenizer, "tokenizer that the model was trained with")
    if not others:
        return carried
    carried = {name: path for name, path in carried.items() if not is_tokenizer_file(_first(name))}
    carried |= {name: path for name, path in others.items() if is_tokenizer_file(_first(name))}
    if has_own_code(tokenizer):  # its code may import other Python files
        carried = {name: path for name, path in others.items() if name.endswith(".py")} | carried
    return carried


def are_apart(model: Path | None, tokenizer: Path) -> bool:
    """Whether the tokenizer comes from a directory other than the model's."""
    return model is None or tokenizer.resolve() != model.resolve()


def warn_of_end(tokenizer: Path, config: Mapping[str, Any], carried: dict[str, Path]) -> None:
    """Warns if the training data ended texts with a token at which generation does not stop."""
    fields = dict(config)
    if "generation_config.json" in carried:
        fields |= json.loads(carried["generation_config.json"].read_text(encoding="utf-8"))
    stops, end = fields.get("eos_token_id"), end_token(tokenizer)
    if end is not None and end not in (stops if isinstance(stops, list) else [stops]):
        warnings.warn(
            f"the tokenizer of {tokenizer} ends texts with token {end}, but generation from this export stops at "
            f"eos_token_id={stops}; change it in its config.json and generation_config.json.",
            stacklevel=4,
        )


def foreign_file(directory: Path, carried: dict[str, Path]) -> str | None:
    """Returns the first file in a directory that would be lost if an export replaced it, or None.

    Args:
        directory: Directory to be replaced.
        carried: Side files of the export. A file of the same name with other content would be lost.
    """
    return next(_foreign(directory, "", carried), None)


def _foreign(directory: Path, prefix: str, carried: dict[str, Path]) -> Iterator[str]:
    entries = sorted(directory.iterdir())
    if prefix and not entries:
        yield prefix
    for path in entries:
        name = f"{prefix}/{path.name}".removeprefix("/")
        if path.is_dir() and not path.is_symlink():
            yield from _foreign(path, name, carried)
        elif not path.is_file():
            yield name
        elif _matches(name, _OF_AN_EXPORT):
            continue
        elif name not in carried or not filecmp.cmp(path, carried[name], shallow=False):
            yield name


def _existing(directory: Path | None, what: str) -> dict[str, Path]:
    if directory is None:
        return {}
    if not directory.is_dir():
        warnings.warn(
            f"the {what} cannot be exported, as {directory} is gone; copy the files beside the weights.", stacklevel=4
        )
        return {}
    return side_files(directory)


def _first(name: str) -> str:
    return PurePosixPath(name).parts[0]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
