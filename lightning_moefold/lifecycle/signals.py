# SPDX-License-Identifier: Apache-2.0
"""SIGTERM ends a run at the end of a batch, on whatever rank it arrives.

Lightning's own handler broadcasts over all ranks from inside the signal handler, possibly in the middle of another
collective; under a fold the two meet and all ranks hang. Here the handler only sets a flag, and passes the signal to
the processes that this one has launched. Lightning checks the flag and stops at the end of the batch. Ranks that did
not receive the signal lose contact and end with one line each.
"""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl


def stop_quietly(trainer: pl.Trainer) -> None:
    """Replaces Lightning's part in the handler of SIGTERM; the user's own handlers stay.

    Args:
        trainer: The Trainer, with its signal handlers registered. It removes this one with them at its end.
    """
    connector = trainer._signal_connector
    handlers: list[Any] | None = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", None)
    if handlers is None:  # not in the main thread, or no such handlers in this Lightning
        return

    def take_note(signum: int, _: Any) -> None:
        launcher = trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(signum)
        connector.received_sigterm = True

    notifier = connector._sigterm_notifier_fn
    handlers[:] = [take_note if handler == notifier else handler for handler in handlers]
