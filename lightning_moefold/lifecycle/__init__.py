# SPDX-License-Identifier: Apache-2.0
"""What happens when in a run: settings, set-up, precision, checkpoints, signals, the end. The strategy delegates to it."""
