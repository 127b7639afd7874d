# SPDX-License-Identifier: Apache-2.0
"""Parts of a run to which the strategy delegates: settings, set-up, precision, checkpoints, signals, the end."""
