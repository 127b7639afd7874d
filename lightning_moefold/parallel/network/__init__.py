# SPDX-License-Identifier: Apache-2.0
"""Custom networks: the protocol they implement, and how they run in place of their own ``forward``."""
