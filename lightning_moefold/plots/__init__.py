# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: ``moefold plot``."""

from lightning_moefold.plots.pictures import write_pictures
from lightning_moefold.plots.read import RecordedLoad, Run, read_run
from lightning_moefold.plots.versions import Series

__all__ = ["RecordedLoad", "Run", "Series", "read_run", "write_pictures"]
