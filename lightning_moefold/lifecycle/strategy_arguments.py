# SPDX-License-Identifier: Apache-2.0
"""Checks those arguments of ``MoEFoldStrategy`` that no configuration checks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_moefold.arguments import check_choice
from lightning_moefold.errors import InputError, InputTypeError
from lightning_moefold.planner.search.auto import AutoFold


def check_fold_arguments(fold: Any, sizes: Sequence[Any], auto: Any, pipeline_split: Any) -> None:
    """Checks the types of what says the fold, and that it is said once.

    Raises:
        InputError: Naming the argument.
    """
    if not (fold is None or isinstance(fold, (str, list, tuple))):
        raise InputTypeError(
            f"fold={fold!r} must be a text such as 'tp2 | ep4', a list of such texts, 'auto', or None."
        )
    if not (auto is None or isinstance(auto, AutoFold)):
        raise InputTypeError(f"auto={auto!r} is not available; use AutoFold(...), or None.")
    if not (pipeline_split is None or isinstance(pipeline_split, (list, tuple))):
        raise InputTypeError(f"pipeline_split={pipeline_split!r} must be a list of numbers of layers, or None.")
    if fold is not None and any(size != 1 for size in sizes):
        raise InputError(f"fold={fold!r} and parallel sizes are both given; use one or the other.")
    if auto is not None and fold != "auto":
        raise InputError('auto=AutoFold(...) is for fold="auto"; leave one out or give both.')
    if fold == "auto" and pipeline_split is not None:
        raise InputError('pipeline_split is for a pipeline of known size; leave it out with fold="auto".')
    if isinstance(fold, (list, tuple)):
        if any(not isinstance(one, str) for one in fold):
            raise InputTypeError(f"fold={fold!r} must name each fold by a text such as 'tp2 | ep4'.")
        if not fold or "auto" in fold:
            raise InputError(f'fold={fold!r} must name folds in order of preference; use fold="auto" alone.')


def check_run_arguments(
    flags: dict[str, Any], per_token: Any, sequence_parallel: Any, timeout: Any, backend: Any
) -> None:
    """Checks switches, the time to wait for other ranks, and the name of the process group's back end.

    Raises:
        InputError: Naming the argument.
    """
    check_choice("sequence_parallel", sequence_parallel, (None, True))
    check_choice("calculate_per_token_loss", per_token, (None, False, True))
    for name, value in flags.items():
        check_choice(name, value, (False, True))
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise InputTypeError(f"timeout={timeout!r} must be a positive datetime.timedelta, or None for the default.")
    if backend is None:
        return
    known = [name for name in dist.Backend.backend_list if name not in (dist.Backend.UNDEFINED, "mpi")]
    words = str(backend).replace("cpu:", "").replace("cuda:", "").split(",")
    if not isinstance(backend, str) or any(word.lower() not in known for word in words):
        raise InputError(f"process_group_backend={backend!r} is not available; use {' or '.join(map(repr, known))}.")
