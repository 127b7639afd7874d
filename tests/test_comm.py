# SPDX-License-Identifier: Apache-2.0
"""The collectives are called by the names that the installed torch does not warn of."""

import warnings

import torch
import torch.distributed as dist

from lightning_moefold import comm


def test_no_deprecated_collectives(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for collective in (getattr(dist, comm.ALL_GATHER), getattr(dist, comm.REDUCE_SCATTER)):
                out = torch.zeros(3)
                collective(out, torch.arange(3.0), group=dist.group.WORLD)
                assert out.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()
