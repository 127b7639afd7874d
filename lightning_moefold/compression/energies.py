# SPDX-License-Identifier: Apache-2.0
"""The file that an analysis writes and pruning reads. Pure: no process group.

Legend: L MoE layers, E experts, F expert width, S width of the shared expert.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import DAMAGE, InputError

_ARRAYS = ("energy", "shared_energy", "load", "layers")


@dataclass(frozen=True)
class Energies:
    """Energies of the micro-experts of a model, with what they were made of.

    Args:
        energy: Of each channel of each routed expert, ``[L, E, F]`` float64.
        shared_energy: Of each channel of the shared experts, ``[L, S]`` float64; S is 0 without them.
        load: Tokens that each expert had, ``[L, E]`` int64.
        layers: Number in the model of each MoE layer, ``[L]`` int64.
        checkpoint: Fingerprint of the checkpoint.
        ratio: Ratio at which the earlier layers were pruned; NaN for the dense model.
        alpha: Weight of the maximum over tokens against the sum.
        tokens: Number of calibration tokens, without padding.
        rows: Number of calibration rows.
        fold: Under which it was computed.
        dtype: In which layers were computed, such as ``"float32"``; sums are float64 always.
    """

    energy: NDArray[np.float64]
    shared_energy: NDArray[np.float64]
    load: NDArray[np.int64]
    layers: NDArray[np.int64]
    checkpoint: str
    ratio: float
    alpha: float
    tokens: int
    rows: int
    fold: str
    dtype: str

    def save(self, path: str | Path) -> None:
        """Writes the file, complete or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.tmp")
        with draft.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        draft.replace(path)

    @classmethod
    def load_file(cls, path: str | Path) -> Energies:
        """Reads a file.

        Raises:
            InputError: If it is not one that ``moefold camera analyze`` has written.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {field.name: file[field.name] for field in fields(cls)}
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; moefold camera analyze writes such a file.") from None
        except DAMAGE as error:
            raise InputError(
                f"{path} holds no energies ({type(error).__name__}: {error}); moefold camera analyze writes such a file."
            ) from None
        return cls(**{name: value if name in _ARRAYS else value.item() for name, value in found.items()})
