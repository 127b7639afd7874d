# SPDX-License-Identifier: Apache-2.0
"""Rehearses one rank of thousands without the others: its groups, its shards, and every collective of a step."""
