# SPDX-License-Identifier: Apache-2.0
"""Which errors are the user's to mend, so that a command shows their one sentence instead of a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path

import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_moefold
from lightning_moefold.comm import PeerError


class InputError(ValueError):
    """Something that the user can mend; the message is one sentence."""


def is_users(error: BaseException) -> bool:
    """Whether ``error`` was raised on purpose, about what the user gave: by this package or Lightning, or as an InputError.

    A ``ValueError`` or ``TypeError`` that comes out of any other code is a bug, and its traceback is worth more than its
    message.
    """
    if isinstance(error, (InputError, PeerError, MisconfigurationException)):
        return True
    if not isinstance(error, (ValueError, TypeError)):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, TypeError) and not str(last.line).startswith("raise "):
        return False  # Python's own, about a call
    homes = [Path(str(package.__file__)).parent for package in (lightning_moefold, lightning)]
    return any(Path(last.filename).is_relative_to(home) for home in homes)
