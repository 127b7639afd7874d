# SPDX-License-Identifier: Apache-2.0
"""Models by the name that they have on the Hugging Face hub: ``organisation/name``, or ``organisation/name@revision``.

Files come through ``huggingface_hub`` into its cache, whose locks let the ranks of a node download each file once; offline, from
the cache alone. Weights are fetched as safetensors only. A directory of the name goes first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lightning_moefold.errors import CheckpointError

_NAME = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]*[\w-])(@(?P<revision>[\w.\-/]+))?$")
_CONFIG = ["config.json"]
_TOKENIZER = [*_CONFIG, "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
_WEIGHTS = [*_TOKENIZER, "*.safetensors", "LICENSE*", "README.md"]
#: Other forms of the model, or of its tensors.
_NEVER = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "original/*", "consolidated*"]
_PARTS = {"config": _CONFIG, "tokenizer": _TOKENIZER, "model": _WEIGHTS}


def local_directory(
    path: str | Path, part: Literal["config", "tokenizer", "model"] = "model", revision: str | None = None
) -> Path:
    """The directory ``path``; if there is none and it can be a name on the hub, the directory in the cache with that model.

    Args:
        path: A directory, or a name.
        part: Which part of a model on the hub is fetched.
        revision: Branch, tag or commit of a model on the hub.

    Raises:
        CheckpointError: If the model cannot be fetched and is not in the cache, a directory is given with a revision,
            the name has another one, or the path is an address in a store.
    """
    if not isinstance(path, Path) and "://" in path:
        from lightning_moefold.checkpoint.stores import (
            local_path,
        )  # imported here, because the planner does without torch

        path = local_path(path, f"the {part}'s directory")
    match = _NAME.match(str(path))
    if match is None or isinstance(path, Path) or Path(path).exists():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} says which version on the hub is meant, but {path} is a directory."
            )
        return Path(path)
    if revision is not None and match["revision"] not in (None, revision):
        raise CheckpointError(f"{path} names another revision than revision={revision!r}; give one of them.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{path} is no directory here, and to fetch it from the hub huggingface_hub is needed; "
            "pip install 'lightning-moefold[hf]'."
        ) from None
    try:
        found = snapshot_download(
            match["name"], revision=revision or match["revision"], allow_patterns=_PARTS[part], ignore_patterns=_NEVER
        )
    except Exception as error:  # of many libraries: of the network, of the hub, of the cache
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} is no directory here, nor in the hub's cache, and cannot be fetched ({type(error).__name__}: {reason}); check "
            "the name, the network and, for a gated model, HF_TOKEN."
        ) from None
    return Path(found)
