# SPDX-License-Identifier: Apache-2.0
"""Says in one sentence why a file could not be written or read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_moefold.errors import CheckpointError, PeerError

_WORDS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.ENOENT: "a file or directory is gone",
    errno.ESTALE: "a file or directory is gone",
    errno.EIO: "the disk reports an error",
    errno.EFBIG: "a file would be larger than allowed",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file",
}


def reason_of(error: BaseException) -> str:
    """Returns the cause of an error in a few words, without a line break.

    Errors of the operating system are named by what they mean, also where torch has put its own error over them.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    if isinstance(found, OSError) and found.errno in _WORDS:
        place = found.filename
        name = f" ({Path(place).name})" if isinstance(place, str) and found.errno == errno.ENOENT else ""
        return f"{_WORDS[found.errno]}{name}"
    text = " ".join(str(error).split("\n", 1)[0].split())
    if isinstance(error, CheckpointError):
        return text
    if isinstance(error, EOFError) or "PytorchStreamReader failed" in text:
        return "it is cut off or damaged"
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextmanager
def in_one_sentence(target: Path | str) -> Iterator[None]:
    """A context of saving ``target``, which turns errors of the system and of stores into a CheckpointError."""
    try:
        yield
    except (CheckpointError, PeerError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{target} cannot be saved: {reason_of(error)}; what was saved before is unchanged."
        ) from error
