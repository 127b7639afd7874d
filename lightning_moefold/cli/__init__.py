# SPDX-License-Identifier: Apache-2.0
"""The ``moefold`` command: one file a subcommand, and what a terminal shows."""
