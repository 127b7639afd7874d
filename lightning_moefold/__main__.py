# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_moefold`` is the ``moefold`` command."""

import sys

from lightning_moefold.cli.main import main

sys.exit(main())
