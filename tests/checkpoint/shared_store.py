# SPDX-License-Identifier: Apache-2.0
"""Stores in the place of a cloud's: ``bucket://`` lies on disk, so that all ranks see it, but knows no renaming."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Bucket(DirFileSystem):
    """Files and folders of the disk, of which nothing can be renamed in one step."""

    protocol = "bucket"

    def __init__(self, **options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("bucket://").strip("/")

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.copy(path1, path2)
        self.rm(path1)

    rename = mv


def register() -> None:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
