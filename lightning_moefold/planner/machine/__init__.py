# SPDX-License-Identifier: Apache-2.0
"""Describes machines by constants, with their sources, and measures them."""
