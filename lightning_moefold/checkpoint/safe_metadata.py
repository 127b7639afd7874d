# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints of torch.distributed.checkpoint without running code from them.

torch unpickles two things: the file ``.metadata``, and every entry that the metadata declares as bytes. Here the pickle
may use only the classes of metadata, and every entry must be a tensor in a file of the same directory.
"""

from __future__ import annotations

import io
import pickle
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_moefold.errors import InputError

#: Constructors without side effects: those of plain values and of torch's metadata.
_HARMLESS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name.endswith("Path") and name.isidentifier():
            return PurePath  # the path of the save; Python versions define path classes in different modules
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a list of tensors")
        return super().find_class(module, name)


def unpickle_list(content: bytes) -> Metadata:
    """Reads the content of a file ``.metadata``.

    Raises:
        pickle.UnpicklingError: If it names a class that could run code.
        ValueError: If it is not a list of tensors in files of this directory.
    """
    return _checked(_Unpickler(io.BytesIO(content)).load())


def _checked(metadata: Any) -> Metadata:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise InputError("it is no list of tensors")
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata) or not isinstance(name, str):
            raise InputError(f"{name!r} is no tensor, and nothing else is read")
        if not isinstance(item.properties.dtype, torch.dtype) or not _are_sizes(item.size):
            raise InputError(f"{name!r} has no shape or no dtype")
        for chunk in item.chunks:
            if not _are_sizes(chunk.offsets) or not _are_sizes(chunk.sizes) or len(chunk.offsets) != len(item.size):
                raise InputError(f"{name!r} has a part without a place in it")
    files = set()
    for index, info in (metadata.storage_data or {}).items():
        if not isinstance(index.fqn, str) or not isinstance(info.relative_path, str):
            raise InputError("it does not say where its tensors lie")
        if info.relative_path not in files:
            place = PurePath(info.relative_path)
            if place.is_absolute() or ".." in place.parts:
                raise InputError(f"{index.fqn!r} lies in {info.relative_path!r}, outside the directory")
            files.add(info.relative_path)
        if not _is_size(info.offset) or not _is_size(info.length):
            raise InputError(f"{index.fqn!r} has no place in {info.relative_path!r}")
    return metadata


def _are_sizes(values: Any) -> bool:
    if isinstance(values, torch.Size):  # of integers
        return not values or min(values) >= 0
    return isinstance(values, (tuple, list)) and all(map(_is_size, values))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 0
