# SPDX-License-Identifier: Apache-2.0
"""What a plan costs in time and memory. Pure Python and numpy."""
