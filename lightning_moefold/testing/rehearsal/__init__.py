# SPDX-License-Identifier: Apache-2.0
"""One rank of a thousand rehearsed on no machine: its groups, its shards, and every collective of a step."""
