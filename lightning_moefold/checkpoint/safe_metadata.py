# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints of torch.distributed.checkpoint without running code from them.

torch unpickles two things: the file ``.metadata``, and every entry that the metadata declares as bytes. Here the pickle
may use only the classes of metadata, and every entry must be a tensor in a file of the same directory.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

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


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint directory, restricted to tensors.

    The list of tensors, which may be long, is read once.

    Args:
        path: Directory of the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._list: Metadata | None = None

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """Reads and checks the list of tensors.

        Raises:
            pickle.UnpicklingError: If the file names a class that could run code.
            ValueError: If the file is not a list of tensors in this directory.
        """
        if self._list is None:
            path = self.fs.concat_path(self.path, ".metadata")
            with self.fs.create_stream(path, "rb") as file:
                self._list = _checked(_Unpickler(io.BytesIO(file.read())).load())
        if self._list.storage_meta is None:
            self._list.storage_meta = StorageMeta()
        self._list.storage_meta.load_id = self.load_id
        return self._list

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Returns shape and dtype of each tensor by name; raises the errors of :meth:`read_metadata`."""
        listed = self.read_metadata().state_dict_metadata
        return {name: item for name, item in listed.items() if isinstance(item, TensorStorageMetadata)}


def _checked(metadata: Any) -> Metadata:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise InputError("it is no list of tensors")
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            raise InputError(f"{name!r} is no tensor, and nothing else is read")
    for index, info in (metadata.storage_data or {}).items():
        place = PurePath(info.relative_path)
        if place.is_absolute() or ".." in place.parts:
            raise InputError(f"{index.fqn!r} lies in {info.relative_path!r}, outside the directory")
    return metadata
