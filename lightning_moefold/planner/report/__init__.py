# SPDX-License-Identifier: Apache-2.0
"""Printed output of a search: tables, explanations and advice."""
