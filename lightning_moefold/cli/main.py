# SPDX-License-Identifier: Apache-2.0
"""The ``moefold`` command.

A subcommand is one entry of :data:`COMMANDS`, and a module with two functions: ``configure`` adds its arguments to a parser,
``run`` runs it. Only the module of the requested subcommand is imported. Those of :data:`TRAINER_COMMANDS` are
LightningCLI's, which reads its arguments itself; so does ``data``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning_moefold
from lightning_moefold.errors import InputError, sentence


class Command(NamedTuple):
    """A subcommand.

    Args:
        help: One line of help.
        module: Module that defines ``configure(parser)`` and ``run(arguments)``, which returns the exit status.
    """

    help: str
    module: str


COMMANDS: dict[str, Command] = {
    "balance": Command("compare policies of expert balance on recorded routing", "lightning_moefold.cli.balance"),
    "calibrate": Command("measure this machine for the planner", "lightning_moefold.cli.calibrate"),
    "camera": Command("find the micro-experts that matter, and prune the others", "lightning_moefold.cli.camera"),
    "eval": Command("run tasks of lm-eval on a checkpoint", "lightning_moefold.cli.evaluate"),
    "export": Command("write a checkpoint of a run as a Hugging Face directory", "lightning_moefold.cli.export"),
    "generate": Command("continue the prompts of a file", "lightning_moefold.cli.generate"),
    "merge": Command("add an adapter to the weights of its model", "lightning_moefold.cli.merge"),
    "plan": Command("rank the folds of a model on a machine", "lightning_moefold.cli.plan"),
    "plot": Command("draw the loss, speed, memory and expert load of a run", "lightning_moefold.cli.plot"),
    "prune-experts": Command("keep the best experts of each layer", "lightning_moefold.cli.prune_experts"),
    "upcycle": Command("make a mixture of experts of a dense model", "lightning_moefold.cli.upcycle"),
    "verify": Command("check that a fold computes what one process computes", "lightning_moefold.cli.verify"),
}

TRAINER_COMMANDS: dict[str, str] = {
    "fit": "train",
    "validate": "measure the loss on the validation text",
    "test": "measure the loss on the test text",
    "predict": "write the loss of every document",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``moefold``; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given == ["--version"]:
        print(f"moefold {lightning_moefold.__version__}")
        return 0
    given = given or ["--help"]
    asked = given[0] if given else ""
    if asked in TRAINER_COMMANDS:
        from lightning_moefold.cli import fit

        return fit.run(asked, given[1:])
    if asked == "data":
        from lightning_moefold.cli import data

        return data.run(given[1:])
    parser = argparse.ArgumentParser(prog="moefold", description="MoE Parallel Folding for PyTorch Lightning.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, description=command.help.capitalize() + ".")
        if name == asked:
            module = importlib.import_module(command.module)
            module.configure(one)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (moefold {name} --help)")
    commands.add_parser("data", help="show what a run will be trained on (moefold data preview --help)")
    arguments = parser.parse_args(given)
    try:
        check_paths(arguments)
        status: int = module.run(arguments)
    except BrokenPipeError:
        return 1
    except (ValueError, OSError) as error:
        print(f"moefold {arguments.command}: {sentence(error)}", file=sys.stderr)
        return 2
    return status


def check_paths(arguments: argparse.Namespace) -> None:
    """Refuses addresses in a store for arguments that are local files, before anything is computed for them.

    Raises:
        InputError: Naming the argument. Its Path has lost a slash, and would be a folder named ``s3:`` here.
    """
    for name, value in vars(arguments).items():
        scheme = value.parts[0] if isinstance(value, Path) and value.parts else ""
        if scheme.endswith(":") and len(scheme) > 2:  # a drive of Windows has one letter
            raise InputError(
                f"--{name.replace('_', '-')} {scheme}//{'/'.join(value.parts[1:])} is an address, and files of moefold "
                f"{arguments.command} are local; give a plain path."
            )


if __name__ == "__main__":
    sys.exit(main())
