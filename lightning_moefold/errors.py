# SPDX-License-Identifier: Apache-2.0
"""Errors that are written for the user. Each message is one sentence: what, which rule, what to do. Pure Python."""

from __future__ import annotations

import sys
import traceback
import zlib
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile


class MoEFoldError(Exception):
    """The base of all errors that this package raises on purpose."""


class InputError(MoEFoldError, ValueError):
    """Something that the user gave cannot be used."""


class InputTypeError(InputError, TypeError):
    """Something that the user gave is of the wrong type."""


class FoldError(InputError):
    """The sizes of a fold contradict each other, the model or the number of ranks."""


class ConfigError(InputError):
    """A model configuration cannot be honoured."""


class CheckpointError(InputError):
    """A checkpoint is damaged, or does not fit the model."""


class BatchError(InputError):
    """A batch cannot be trained on."""


class TreeError(InputError):
    """A module tree differs from what its model declares."""


class HookError(InputError):
    """A hook of the user would see only a part of the gradients."""


class UnsupportedFeature(InputError):
    """A feature of Lightning cannot work under a fold."""


class HardwareError(InputError):
    """A description of a machine is unknown or incomplete."""


class PlanError(InputError):
    """A plan or a job contradicts itself."""


class NonFiniteError(MoEFoldError, RuntimeError):
    """A loss, gradient or weight is NaN or infinite, and the run was stopped. Raised on all ranks."""


class ReplicaError(MoEFoldError, RuntimeError):
    """Copies of a parameter differ between ranks. Raised on all ranks."""


class PeerError(MoEFoldError, RuntimeError):
    """Another rank failed."""


#: What Python's and NumPy's readers raise at damaged archives and texts, for those who turn it into a sentence.
DAMAGE = (
    OSError, EOFError, BadZipFile, zlib.error, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, NotImplementedError, RuntimeError, SyntaxError, TokenError,
)  # fmt: skip


def is_users(error: BaseException) -> bool:
    """Whether the user can fix the cause of ``error``; commands then show its sentence instead of a traceback.

    An ``OSError`` is about a file, the network, a permission or the disk. A ``ValueError`` or ``TypeError`` that neither this
    package nor Lightning raised on purpose is a bug, and its traceback says more than its message. So is a
    ``RuntimeError``, except those of Lightning's callbacks, such as about a metric that was never logged.
    """
    if isinstance(error, (MoEFoldError, OSError)):
        return True
    lightning = sys.modules.get("lightning")
    if lightning is None:
        return False
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, (ValueError, TypeError, RuntimeError)) or error.__traceback__ is None:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not str(last.line).startswith("raise "):
        return False  # raised by Python itself, about a call
    home = Path(str(lightning.__file__)).parent
    return Path(last.filename).is_relative_to(home / "pytorch/callbacks" if isinstance(error, RuntimeError) else home)


def sentence(error: BaseException) -> str:
    """Returns the message of an error in one line; for an ``OSError`` what failed, and the path."""
    if isinstance(error, OSError) and error.strerror:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return f"{error.strerror}: {' and '.join(paths)}" if paths else error.strerror
    return " ".join(str(error).split())
