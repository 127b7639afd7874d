# SPDX-License-Identifier: Apache-2.0
"""Names of the files that callbacks write and ``moefold plot`` reads. Pure Python."""

from __future__ import annotations

EXPERT_LOAD = "expert_load.npz"
EXPERT_PLACEMENT = "expert_placement.npz"
PIPELINE_TIMELINE = "pipeline_timeline.json"
ROUTING_TRACE = "routing_trace.npz"

NO_EXPERT = -1
"""Count in a table of loads where a layer has fewer experts than the widest."""
