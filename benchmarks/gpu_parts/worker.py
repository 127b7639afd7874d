# SPDX-License-Identifier: Apache-2.0
"""The process of some parts."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def work(names: list[str], folder: Path, seconds: float, rehearse: bool) -> int:
    """Runs parts; what they find lies in the folder as they go."""
    end = time.monotonic() + seconds
    faulthandler.register(signal.SIGUSR1)  # sent before the process is ended
    import torch

    from gpu_parts.record import Context, DeviceLost, Record, one_line, trace_of

    device = torch.device("cuda" if torch.cuda.is_available() and not rehearse else "cpu")
    if device.type == "cpu" and not rehearse:
        print("there is no GPU; --rehearse runs everything in small on CPU", file=sys.stderr)
        return 1
    status = 0
    for name in names:
        record = Record(name, folder, end - time.monotonic())
        scratch = folder / f"{name}-files"
        scratch.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            part = importlib.import_module(f"gpu_parts.{name}")
            gc.collect()
            gc.freeze()  # what imports made need not be looked through again
            part.run(Context(device, rehearse, record, scratch))
            record.data["status"] = "done"
        except DeviceLost as error:
            record.data["status"] = "lost"
            record.save()
            print(f"{name}: the device answers no more: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        except Exception as error:
            record.data["status"] = "failed"
            record.data["errors"][name] = {"line": one_line(error), "trace": trace_of(error)}
            print(trace_of(error), file=sys.stderr)
            status = 1
        record.data["doing"] = None
        record.save()
        shutil.rmtree(scratch, ignore_errors=True)
    sys.stdout.flush()
    # Not by way of finalizers: process groups and compile workers can hold a process up for long.
    os._exit(status)
