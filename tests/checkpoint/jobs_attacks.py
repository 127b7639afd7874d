# SPDX-License-Identifier: Apache-2.0
"""Files that run code in whoever unpickles them, and the doors of the Trainer at which they are left."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lightning_moefold.checkpoint.safe_metadata import unpickle_list
from tests.strategy import finetune


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def save(path: str, folder: str) -> None:
    """A checkpoint of a run."""
    run = finetune.make("", {"max_steps": 1})
    run.fit(finetune.Finetune(path))
    run.save_checkpoint(Path(folder, "good.ckpt"))


def _metadata(checkpoint: Path) -> Metadata:
    return unpickle_list((checkpoint / ".metadata").read_bytes())


def _in_place_of_metadata(checkpoint: Path, attack: Attack) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(attack))


def _inside_metadata(checkpoint: Path, attack: Attack) -> None:
    changed = replace(_metadata(checkpoint), planner_data={"attack": attack})
    (checkpoint / ".metadata").write_bytes(pickle.dumps(changed))


def _as_bytes(checkpoint: Path, attack: Attack) -> None:
    """Torch unpickles what the metadata calls bytes, even where a tensor is asked for."""
    metadata = _metadata(checkpoint)
    buffer = io.BytesIO()
    torch.save(attack, buffer)
    (checkpoint / "attack.distcp").write_bytes(buffer.getvalue())
    name = "model.model.model.norm.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == name:
            changed = replace(info, relative_path="attack.distcp", offset=0, length=len(buffer.getvalue()))
            metadata.storage_data[replace(index, offset=None)] = metadata.storage_data[index] = changed
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_place_of_tensors(checkpoint: Path, attack: Attack) -> None:
    metadata = _metadata(checkpoint)
    buffer = io.BytesIO()
    torch.save(attack, buffer)
    (checkpoint / "attack.distcp").write_bytes(buffer.getvalue())
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(
            info, relative_path="attack.distcp", offset=0, length=len(buffer.getvalue())
        )
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _outside(checkpoint: Path, attack: Attack) -> None:
    metadata = _metadata(checkpoint)
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path=f"../good.ckpt/{info.relative_path}")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_meta(checkpoint: Path, attack: Attack) -> None:
    meta = torch.load(checkpoint / "meta.pt", weights_only=False)
    torch.save({**meta, "hyper_parameters": {"attack": attack}}, checkpoint / "meta.pt")


def _in_place_of_meta(checkpoint: Path, attack: Attack) -> None:
    (checkpoint / "meta.pt").write_bytes(pickle.dumps(attack))  # the format of old torch versions


ATTACKS: dict[str, Callable[[Path, Attack], None]] = {
    "in place of .metadata": _in_place_of_metadata,
    "inside .metadata": _inside_metadata,
    "a tensor as bytes": _as_bytes,
    "in place of tensors": _in_place_of_tensors,
    "outside the directory": _outside,
    "in meta.pt": _in_meta,
    "in place of meta.pt": _in_place_of_meta,
}


def make_attack(folder: str | Path, name: str) -> tuple[Path, Path]:
    """A checkpoint with an attack in it, and the file that appears if it succeeds."""
    bad, marker = Path(folder, "bad.ckpt"), Path(folder, "attacked")
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(Path(folder, "good.ckpt"), bad)
    ATTACKS[name](bad, Attack(marker))
    return bad, marker


def at_the_trainer(path: str, folder: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """What each door says of each attack, and whether it succeeded."""
    seen = {}
    for name in ATTACKS:
        bad, marker = make_attack(folder, name)
        for verb in ("fit", "validate", "test", "predict"):
            run = finetune.make("", {"max_steps": 2})
            try:
                getattr(run, verb)(finetune.Finetune(path), ckpt_path=str(bad))
                said = "no error"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            seen[name, verb] = said, marker.exists()
        marker.unlink(missing_ok=True)
        for what in (bad, bad / "meta.pt"):
            try:
                finetune.Finetune.load_from_checkpoint(what, path=path)
                said = "no error"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            seen[name, f"load_from_checkpoint {what.name}"] = said, marker.exists()
    return seen


def single_files(path: str, folder: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """What a model in pieces and a plain module say of a file that attacks."""
    file, marker = Path(folder, "bad.ckpt"), Path(folder, "attacked")
    torch.save({"state_dict": {}, "attack": Attack(marker)}, file)
    seen = {}
    for name, make in {"MoE": lambda: finetune.Finetune(path), "plain": BoringModel}.items():
        for verb in ("fit", "validate", "test", "predict"):
            run = finetune.make("", {"max_steps": 1, "precision": "32-true"})
            try:
                getattr(run, verb)(make(), ckpt_path=str(file))
                said = "no error"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            seen[name, verb] = said, marker.exists()
    return seen
