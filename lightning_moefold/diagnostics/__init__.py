# SPDX-License-Identifier: Apache-2.0
"""What is said when a run fails: which rank, which stage, which collective."""
