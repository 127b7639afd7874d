# SPDX-License-Identifier: Apache-2.0
"""The ``moefold`` command: one file per subcommand, and the terminal output."""
