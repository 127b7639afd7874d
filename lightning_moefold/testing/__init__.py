# SPDX-License-Identifier: Apache-2.0
from lightning_moefold.testing.environment import PoolEnvironment
from lightning_moefold.testing.pool import RankError, RankPool, RankTimeout
__all__ = ["PoolEnvironment", "RankError", "RankPool", "RankTimeout"]
