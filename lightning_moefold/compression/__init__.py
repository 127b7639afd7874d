# SPDX-License-Identifier: Apache-2.0
"""Smaller experts: energies of micro-experts, pruning of channels and of experts, and experts from dense models."""
