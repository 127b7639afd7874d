# SPDX-License-Identifier: Apache-2.0
"""The ``moefold`` command.

A subcommand is one entry of :data:`COMMANDS`, and a module with two functions: ``configure(parser)`` adds its arguments,
``run(arguments)`` runs it and returns the exit status. Only the module of the requested subcommand is imported. Those of
:data:`TRAINER_COMMANDS` are LightningCLI's, which reads its arguments itself; so does ``data``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning_moefold
from lightning_moefold.errors import InputError, is_users, sentence

#: By name, the module in this package and one line of help.
COMMANDS: dict[str, tuple[str, str]] = {
    "balance": ("balance", "compare policies of expert balance on recorded routing"),
    "calibrate": ("calibrate", "measure this machine for the planner"),
    "camera": ("camera", "find the micro-experts that matter, and prune the others"),
    "eval": ("evaluate", "run tasks of lm-eval on a checkpoint"),
    "export": ("export", "write a checkpoint of a run as a Hugging Face directory"),
    "generate": ("generate", "continue the prompts of a file"),
    "merge": ("merge", "add an adapter to the weights of its model"),
    "plan": ("plan", "rank the folds of a model on a machine"),
    "plot": ("plot", "draw the loss, speed, memory and expert load of a run"),
    "prune-experts": ("prune_experts", "keep the best experts of each layer"),
    "upcycle": ("upcycle", "make a mixture of experts of a dense model"),
    "verify": ("verify", "check that a fold computes what one process computes"),
}

TRAINER_COMMANDS: dict[str, str] = {
    "fit": "train",
    "validate": "measure the loss on the validation text",
    "test": "measure the loss on the test text",
    "predict": "write the loss of every document",
}

#: Arguments that are local files or directories though they are read as text; and those that are no options.
LOCAL_FILES = ("output", "plot", "pool", "write_pool", "timeline", "trace")
POSITIONAL = ("trace", "runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``moefold``; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if given == ["--version"]:
        print(f"moefold {lightning_moefold.__version__}")
        return 0
    asked = given[0]
    if asked in TRAINER_COMMANDS:
        from lightning_moefold.cli import fit

        return fit.run(asked, given[1:])
    if asked == "data":
        from lightning_moefold.cli import data

        return data.run(given[1:])
    parser = argparse.ArgumentParser(prog="moefold", description="MoE Parallel Folding for PyTorch Lightning.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module_name, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == asked:
            module = importlib.import_module(f"lightning_moefold.cli.{module_name}")
            module.configure(one)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (moefold {name} --help)")
    commands.add_parser("data", help="show what a run will be trained on (moefold data preview --help)")
    arguments = parser.parse_args(given)
    try:
        check_paths(arguments, given)
        check_replaces_nothing_read(arguments)
        status: int = module.run(arguments)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if not (isinstance(error, ValueError) or is_users(error)):
            raise
        print(f"moefold {arguments.command}: {sentence(error)}", file=sys.stderr)
        return 2
    return status


def check_paths(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Refuses addresses in a store for arguments that are local files, before anything is computed for them.

    Args:
        arguments: What was read; a Path there has lost a slash, and would be a folder named ``s3:`` here.
        given: What it was read from.

    Raises:
        InputError: Naming the argument.
    """
    addresses = {str(Path(text)): text for text in (one.rpartition("=")[2] for one in given) if "://" in text}
    for name, value in vars(arguments).items() if addresses else ():
        for one in value if isinstance(value, list) else [value]:
            # A checkpoint, model or tokenizer that is given as text says itself where it may lie.
            if (isinstance(one, Path) or name in LOCAL_FILES) and str(Path(str(one))) in addresses:
                option = "" if name in POSITIONAL else f"--{name.replace('_', '-')} "
                raise InputError(
                    f"{option}{addresses[str(Path(str(one)))]} is an address, and files of moefold {arguments.command} are "
                    "local; give a plain path."
                )


def check_replaces_nothing_read(arguments: argparse.Namespace) -> None:
    """Refuses an output that is the model which the command reads, and which would be gone.

    Raises:
        InputError: If it is.
    """
    source, output = (getattr(arguments, name, None) for name in ("checkpoint", "output"))
    both = source is not None and output is not None and Path(source).is_dir() and Path(output).is_dir()
    if both and Path(str(output)).samefile(str(source)):
        raise InputError(
            f"--output {output} is the model of --checkpoint, which it would replace; give another directory."
        )


if __name__ == "__main__":
    sys.exit(main())
