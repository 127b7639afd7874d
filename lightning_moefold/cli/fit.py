# SPDX-License-Identifier: Apache-2.0
"""``moefold fit``, ``validate``, ``test`` and ``predict``: LightningCLI with this package's module and data as defaults."""

from __future__ import annotations

import os
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_moefold.callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_moefold.checkpoint.sharded import META
from lightning_moefold.checkpoint.stores import parse_path
from lightning_moefold.cli.messages import one_sentence, unlogged
from lightning_moefold.cli.resuming import agreed_last_checkpoint, endings, remove_empty_start
from lightning_moefold.cli.terminal import peers_end_too, progress_display, quiet
from lightning_moefold.errors import InputError, is_users, sentence
from lightning_moefold.lifecycle.fold_choice import announce
from lightning_moefold.recipes.data import TextData
from lightning_moefold.recipes.module import FineTuneModule
from lightning_moefold.strategy import MoEFoldStrategy

try:
    import yaml
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
except ImportError:  # Lightning's own file needs yaml
    LightningArgumentParser, LightningCLI, SaveConfigCallback = object, object, object  # type: ignore[assignment, misc]

#: Defaults of a run, which a configuration may replace.
SEED = 1
#: Seconds that other ranks leave the first to say why all of them end.
_GRACE = 10.0
#: What Lightning finds by itself.
_NAMED = ("last", "best", "hpc")
#: So many checkpoints of a directory are named.
_SHOWN = 5


def run(subcommand: str, arguments: list[str]) -> int:
    """Runs a subcommand and returns its exit status: 0, or 2 for a mistake in the user's input.

    Args:
        subcommand: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        arguments: Arguments after the subcommand on the command line.
    """
    quiet()
    try:
        _need_jsonargparse()
        MoEFoldCLI(args=[subcommand, *_with_classes(arguments)])
    except Exception as error:
        if not is_users(error):
            raise
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print(f"moefold {subcommand}: {unlogged(str(error)) or sentence(error)}", file=sys.stderr, flush=True)
        else:  # launchers kill the first rank when another ends; the first ends the others when it has spoken
            time.sleep(_GRACE)
        return 2
    return 0


def _with_classes(arguments: list[str]) -> list[str]:
    """Returns the arguments with the default class after a ``--model.help`` that names none, and its siblings."""
    defaults = {"--model.help": FineTuneModule, "--data.help": TextData, "--trainer.strategy.help": MoEFoldStrategy}
    found = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        found.append(argument)
        if argument in defaults and following.startswith("--"):
            found.append(f"{defaults[argument].__module__}.{defaults[argument].__qualname__}")
    return found


def named_class(arguments: list[str], key: str) -> str | None:
    """Returns the class that the arguments, or their configuration files, name last for ``model`` or ``data``.

    None without one, and if a file sets arguments of the class that is taken by default.
    """
    found: str | None = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        value = value or following
        if name in (f"--{key}", f"--{key}.class_path"):
            found = value
        elif name in ("--config", "-c"):
            try:
                section = yaml.safe_load(Path(value).read_text())[key]
            except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # the parser says what is wrong
                continue
            if isinstance(section, dict) and "class_path" not in section and found is None:
                return None
            found = section.get("class_path", found) if isinstance(section, dict) else section
    return found


def _need_jsonargparse() -> None:
    try:
        import docstring_parser  # noqa: F401 - what Lightning's parser needs
        import jsonargparse  # noqa: F401
    except ImportError:
        raise InputError(
            "configurations are read by jsonargparse, which is not installed; pip install 'lightning-moefold[cli]'."
        ) from None


class Parser(LightningArgumentParser):
    """Argument parser that reports errors in one sentence, without the list of all arguments."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises an error with the sentence.

        Raises:
            InputError: Always.
        """
        raise InputError(one_sentence(message))


def launched() -> dict[str, int]:
    """Returns the Trainer's ``devices`` and ``num_nodes`` if torchrun or SLURM has started the processes."""
    for local, everywhere in (("LOCAL_WORLD_SIZE", "WORLD_SIZE"), ("SLURM_NTASKS_PER_NODE", "SLURM_NTASKS")):
        if local in os.environ:
            devices = int(os.environ[local])
            return {"devices": devices, "num_nodes": int(os.environ[everywhere]) // devices}
    return {}


def check_checkpoint(given: Any) -> None:
    """Refuses a ``--ckpt_path`` that is absent or something else than a run's checkpoint, before any rank is started.

    Raises:
        InputError: If there is nothing, a model in Hugging Face format, or a directory that holds checkpoints.
    """
    text = str(given)
    if not isinstance(given, (str, Path)) or text in _NAMED or text.startswith(("http", "registry")):
        return
    path = parse_path(given)
    if isinstance(path, str) or path.is_file() or (path / META).is_file():
        return
    if not path.exists():
        raise InputError(
            f"--ckpt_path {given} does not exist; --ckpt_path last takes the newest checkpoint of the run."
        )
    if (path / "config.json").is_file():
        raise InputError(
            f"--ckpt_path {given} is a model in Hugging Face format, not a checkpoint of a run; give it as --model.checkpoint."
        )
    inside = sorted(str(found.relative_to(path)) for found in path.rglob("*.ckpt"))
    if inside:
        shown = ", ".join(inside[:_SHOWN]) + f" and {len(inside) - _SHOWN} more" * (len(inside) > _SHOWN)
        raise InputError(f"--ckpt_path {given} is a directory of checkpoints; give one of them: {shown}.")


def _short(path: str | Path) -> str:
    """Returns the shortest form of a path, relative or absolute."""
    parsed = parse_path(path)
    return parsed if isinstance(parsed, str) else min(os.path.relpath(parsed), str(parsed.absolute()), key=len)


class SaveConfig(SaveConfigCallback):
    """Saves the configuration as a file beside the logs, and as the configuration of a run of Weights & Biases."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hands it to each WandbLogger; called on rank zero."""
        for logger in (logger for logger in trainer.loggers if isinstance(logger, WandbLogger)):
            logger.log_hyperparams(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))


class MoEFoldCLI(LightningCLI):
    """LightningCLI whose Trainer has the strategy ``moefold``, and whose module and data may be replaced by class path.

    Args:
        args: The subcommand and its arguments.
    """

    def __init__(self, args: list[str]) -> None:
        defaults = {
            "strategy": "moefold",
            "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            **launched(),
        }
        self._given = args
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=defaults,
            seed_everything_default=SEED,
            parser_class=Parser,
            parser_kwargs={"prog": "moefold"},
            auto_configure_optimizers=False,
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments without Lightning's warning about ``args``, which does not apply to ``moefold``."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds this package's module and data as defaults, and says where their keys are listed."""
        parser.epilog = (
            "The keys of the module, the data and the strategy: moefold fit --model.help, --data.help, --trainer.strategy.help "
            "(of another class: --model.help CLASS_PATH)."
        )
        for key, kind in (("model", FineTuneModule), ("data", TextData)):
            # Of another class it must be the default itself, or it would get the values that are ours by default.
            path = named_class(self._given, key) or f"{kind.__module__}.{kind.__qualname__}"
            try:
                pkgutil.resolve_name(path)
            except Exception:  # a short name, or one that the parser refuses in a sentence: without a default
                continue
            parser.set_defaults({key: {"class_path": path}})

    def instantiate_classes(self) -> None:
        """Makes module, data and Trainer; errors of their constructors reach the user unchanged."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if not str(error).startswith("Does not validate"):  # not an error of jsonargparse
                raise
            raise InputError(one_sentence(str(error))) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Makes the Trainer, with a progress display unless the configuration has one or turns it off, and SaveOnInterrupt."""
        given = self._get(self.config_init, "trainer", default={})
        callbacks = given.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(progress_display())
        if not any(isinstance(c, SaveOnInterrupt) for c in callbacks):
            callbacks.append(SaveOnInterrupt())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def after_fit(self) -> None:
        """Prints why a run ended early or made no step, and the paths of the checkpoints."""
        if not self.trainer.is_global_zero:
            return
        for line in endings(self.trainer):
            print(line)
        savers = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        saved = [c for c in savers if c._last_checkpoint_saved]
        if not saved:
            return
        # A private attribute, because no public one says which checkpoint is the newest if some are kept by their
        # metric.
        newest = max(saved, key=lambda c: c._last_global_step_saved)._last_checkpoint_saved
        measured = [c.best_model_path for c in saved if c.monitor and c.best_model_path]
        best = measured[0] if measured else newest
        if measured:
            print(f"best checkpoint     {_short(best)}")
        print(f"to resume from      {_short(newest)}")
        print(f"for transformers    moefold export --checkpoint {_short(best)} --output DIR")

    def after_predict(self) -> None:
        """Prints the path of the predictions."""
        if written := getattr(self.model, "predicted", None):
            path, documents = written
            print(f"predictions  {_short(path)}  ({documents} document{'s' * (documents != 1)})")

    def _run_subcommand(self, subcommand: str) -> None:
        began = time.time()
        if self._get(self.config_init, "ckpt_path") == "last":
            found = agreed_last_checkpoint(self.trainer)
            self.config_init[subcommand]["ckpt_path"] = found
            self.config[subcommand]["ckpt_path"] = found  # which config.yaml of the run records
            if subcommand != "fit":  # a fit says it when it resumes
                announce(f"--ckpt_path last is {found}")
        check_checkpoint(self._get(self.config_init, "ckpt_path"))
        try:
            with peers_end_too(self.trainer):
                super()._run_subcommand(subcommand)
        except BaseException:
            remove_empty_start(self.trainer, began)
            raise
        if subcommand == "fit":
            remove_empty_start(self.trainer, began)  # a resumed run without a step to make
