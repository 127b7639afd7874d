# SPDX-License-Identifier: Apache-2.0
"""SaveAdapter, and what a run gives to Weights & Biases: adapters, and the configuration of ``moefold fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from safetensors.torch import load_file

from lightning_moefold import LoRA, MoECausalLM
from lightning_moefold.callbacks import SaveAdapter
from lightning_moefold.cli.fit import SaveConfig
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.testing import make_checkpoint

FILES = {"adapter_config.json", "adapter_model.safetensors"}


class Module(L.LightningModule):
    def __init__(self, path: Path, adapter: LoRA | None) -> None:
        super().__init__()
        self.model = MoECausalLM.from_pretrained(path)
        if adapter is not None:
            self.model.add_adapter(adapter)


def trainer(folder: Path, *loggers: Any) -> Any:
    return mock.Mock(
        spec=L.Trainer, default_root_dir=str(folder), loggers=list(loggers), is_global_zero=True, fast_dev_run=False
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "mixtral", "mixtral")


def test_the_adapter_is_written_and_uploaded(path: Path, tmp_path: Path) -> None:
    module, logger = Module(path, LoRA(rank=2, targets=["q_proj", "experts"])), mock.Mock(spec=WandbLogger)
    with torch.no_grad():
        module.model.model.layers["0"].self_attn.q_proj.lora_B.fill_(1.0)
    callback, run = SaveAdapter(artifact="mine"), trainer(tmp_path, logger)
    callback.on_train_start(run, module)
    callback.on_train_end(run, module)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == FILES
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert bool((stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] == 1).all())
    [artifact] = logger.experiment.log_artifact.call_args.args
    assert (artifact.name, artifact.type, set(artifact.manifest.entries)) == ("mine", "model", FILES)
    SaveAdapter(tmp_path / "elsewhere").on_train_end(trainer(tmp_path), module)
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == FILES


def test_what_cannot_be_saved_is_said_before_training(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no model with an adapter"):
        SaveAdapter().on_train_start(trainer(tmp_path), Module(path, None))
    with pytest.raises(InputError, match="artifact='mine' of SaveAdapter needs a WandbLogger"):
        SaveAdapter(artifact="mine").on_train_start(trainer(tmp_path), Module(path, LoRA(rank=2)))


def test_a_directory_that_cannot_be_written_is_refused_before_training(path: Path, tmp_path: Path) -> None:
    """At the end of training it would be too late: the adapter would be lost."""
    module = Module(path, LoRA(rank=2, targets=["q_proj"]))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds 'notes.txt', which is no part of an adapter"):
        SaveAdapter(tmp_path).on_train_start(trainer(tmp_path), module)
    run = trainer(tmp_path)
    run.default_root_dir = "memory://bucket/run"
    for callback in (SaveAdapter(), SaveAdapter("memory://bucket/adapter")):
        with pytest.raises(CheckpointError, match="is in a store"):
            callback.on_train_start(run, module)


def test_a_trial_run_leaves_an_adapter_as_it_is(path: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fast_dev_run = 1
    callback, module = SaveAdapter(artifact="mine"), Module(path, LoRA(rank=2, targets=["q_proj"]))
    callback.on_train_start(run, module)
    callback.on_train_end(run, module)
    assert not (tmp_path / "adapter").exists()


def test_wandb_gets_the_configuration(path: Path, tmp_path: Path) -> None:
    logger, parser = mock.Mock(spec=WandbLogger), mock.Mock()
    parser.dump.return_value = "trainer: {devices: 2}\nmodel: {init_args: {learning_rate: 0.1}}\n"
    saving = SaveConfig(parser, mock.Mock())
    saving.save_config(trainer(tmp_path, mock.Mock(), logger), Module(path, None), "fit")
    logger.log_hyperparams.assert_called_once_with(
        {"trainer": {"devices": 2}, "model": {"init_args": {"learning_rate": 0.1}}}
    )
