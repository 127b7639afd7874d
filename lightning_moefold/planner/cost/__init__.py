# SPDX-License-Identifier: Apache-2.0
"""Predicts the time and memory of a plan. Pure Python and numpy."""
