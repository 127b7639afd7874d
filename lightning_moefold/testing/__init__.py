# SPDX-License-Identifier: Apache-2.0
"""Tools to verify a model under a fold: persistent ranks, small checkpoints, and Hugging Face as the oracle."""

from lightning_moefold.testing.batches import (
    IGNORE,
    Batch,
    GlobalBatch,
    join_rows,
    make_batches,
    micro_batches,
    unpack_documents,
)
from lightning_moefold.testing.checkpoints import make_checkpoint
from lightning_moefold.testing.compare import assert_close_by_name, relative_error
from lightning_moefold.testing.environment import PoolEnvironment
from lightning_moefold.testing.oracle import ReferenceRun, canonical, reference_run, routing_margin
from lightning_moefold.testing.pool import RankError, RankPool, RankTimeout
from lightning_moefold.testing.reference import hf_reference, lifted
from lightning_moefold.testing.verification import Finding, verify

__all__ = [
    "IGNORE",
    "Batch",
    "Finding",
    "GlobalBatch",
    "PoolEnvironment",
    "RankError",
    "RankPool",
    "RankTimeout",
    "ReferenceRun",
    "assert_close_by_name",
    "canonical",
    "hf_reference",
    "join_rows",
    "lifted",
    "make_batches",
    "make_checkpoint",
    "micro_batches",
    "reference_run",
    "relative_error",
    "routing_margin",
    "unpack_documents",
    "verify",
]
