# SPDX-License-Identifier: Apache-2.0
"""SIGTERM ends a run at the end of a batch, on whatever rank it arrives.

Lightning's own handler broadcasts over all ranks from inside the signal, in the middle of whatever collective the rank was
in; under a fold the two meet and nobody goes on. Here the handler only takes note, and passes the signal to the processes
that this one has launched. Lightning stops at the end of the batch where it finds the note; ranks that never heard of it
lose contact and end with a line each.
"""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl


def stop_quietly(trainer: pl.Trainer) -> None:
    """Puts our part in place of Lightning's in the handler of SIGTERM; handlers of the user's own stay.

    Args:
        trainer: With its signal handlers registered. They are taken away with the others when it ends.
    """
    connector = trainer._signal_connector
    handlers: list[Any] | None = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", None)
    if handlers is None:  # not in the main thread, or a Lightning that has none
        return

    def take_note(signum: int, _: Any) -> None:
        launcher = trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(signum)
        connector.received_sigterm = True

    notifier = connector._sigterm_notifier_fn
    handlers[:] = [take_note if handler == notifier else handler for handler in handlers]
