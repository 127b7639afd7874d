# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot be honoured, of the strategy and of the command line: each is refused in one sentence, and nothing runs.

    python benchmarks/illegal.py [--cases 1000] [--surfaces strategy cli fit] [--seed 0]

A case gives one argument a value that it cannot have, beside legal values of others. ``strategy`` is given the arguments of
``MoEFoldStrategy`` on some number of ranks, ``cli`` those of the subcommands of ``moefold``, ``fit`` keys of a configuration. What
then happens is one of these:

    refused     one line of at most 600 characters; an error of this package, or exit status 2
    ACCEPTED    no error
    CRASH       another error, a traceback, or several lines
    HANG        no end within a minute

Exit status 0 if all are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from training import Finetune

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the small run of the tests

from lightning_moefold import Fold, MoEConfig, MoEFoldStrategy
from lightning_moefold.cli import fit
from lightning_moefold.cli.main import main as moefold
from lightning_moefold.errors import MoEFoldError
from lightning_moefold.testing import make_checkpoint

_SIZE: list[Any] = [0, -1, 1.5, "2", None, [2], float("nan"), 3, 5, 7, 64, True]
_COUNT: list[Any] = [0, -1, 1.5, "2", [1], float("nan"), True]
_NAME: list[Any] = ["", "no such", 3, ["alltoall"], {}, "ALLTOALL "]
_FLAG: list[Any] = ["yes", 2, "", [True], {}]
#: Values that an argument of the strategy cannot have on eight ranks.
STRATEGY: dict[str, list[Any]] = {
    **dict.fromkeys(
        ["tensor_parallel_size", "context_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size"], _SIZE
    ),
    "pipeline_parallel_size": [*_SIZE, 2],  # without num_microbatches
    "fold": [
        "tp3", "tp0", "tp-1", "tp", "tp2 tp2", "xx2", "tp2 | ep3", "dp3", "tp2.5", "tp16", "| ep16", 5,
        [], ["zz"], ["tp3", "ep3"], ["auto"], [3], {}, "automatic", "tp2 | edp1", "2",
    ],
    "auto": [3, "auto", {}],
    "num_microbatches": _COUNT,
    "pipeline_schedule": [*_NAME, None],
    "num_stages_per_rank": [*_COUNT, None],
    "pipeline_split": [[], [0, 4], [-1], ["a"], "ab", [1.5], 3, {}],
    "dispatcher": [*_NAME, None],
    "capacity_factor": [0, -1.0, "1", float("nan"), [1.0], float("inf")],
    "drop_policy": [*_NAME, None],
    "drop_scope": [*_NAME, None],
    "pad_to_capacity": [True, *_FLAG, None],  # without a capacity
    "dispatch_chunks": [*_COUNT, None],
    "node_size": [0, -1, 1.5, "2", [1], float("nan")],
    "expert_copies": [3, "all", True, {}],
    "expert_kernel": [*_NAME, None],
    "data_parallel_sharding": [*_NAME, None],
    "recompute": ["ful", ["no such"], 3, [3], {"moe": 1}, ["moe", "moe", "x"], True],
    "offload_activations": [*_FLAG, None],
    "context_parallel_exchange": [*_NAME, None],
    "calculate_per_token_loss": _FLAG,
    "sequence_parallel": [False, *_FLAG],
    "compile": [*_FLAG, None],
    "checksums": [*_FLAG, None],
    "async_save": [*_FLAG, None],
    "timeout": [5, "1h", [], timedelta(0), timedelta(seconds=-1)],
    "process_group_backend": [3, "smoke", "", []],
}  # fmt: skip
#: Values that go with any other.
LEGAL: dict[str, list[Any]] = {
    "dispatcher": ["alltoall", "allgather"], "data_parallel_sharding": ["none", "optimizer", "full"], "checksums": [True, False],
    "recompute": [None, "full", ["moe"]], "dispatch_chunks": [1, 2], "expert_kernel": ["auto", "loop"],
    "timeout": [timedelta(minutes=1), None],
}  # fmt: skip

_WHOLE: list[str] = ["0", "-1", "1.5", "x", "", "nan", "1e3"]
_PATH: list[str] = ["no/such/path", "", "x\ny", "/dev/null", "/proc/self/mem", "{folder}/odd.json"]
_PLAN = ["plan", "--model", "qwen3-30b-a3b", "--gpus", "8", "--global-batch-size", "64"]
_VERIFY = ["verify", "--checkpoint", "{model}", "--fold", "| ep2", "--ranks", "2"]
#: For each command the words of a legal request, and what an option cannot be; an option that is given replaces the legal one.
CLI: list[tuple[list[str], dict[str, list[str]]]] = [
    (_PLAN, {
        "--model": ["no-such-model", "", "no/such/dir", "/dev/null", "{folder}"], "--gpus": [*_WHOLE, "7919"],
        "--global-batch-size": [*_WHOLE, "7"], "--sequence-length": _WHOLE, "--precision": ["fp7", "", "32"],
        "--hardware": ["abacus", "", "no/such.toml", "{folder}/odd.json", "/dev/null"], "--top": ["-1", "x", "0", "1.5"],
        "--fold": ["tp3", "tp0", "x", "tp2 | ep3", "ep7", "tp64", "tp2 tp2", "auto"], "--lora": ["0", "-1", "x", "1.5"],
        "--micro-batch-size": ["0", "-1", "x", "1.5"], "--schedule": ["2f2b", "", "x"],
        "--stages-per-rank": ["0", "-1", "x", "1.5"], "--recompute": ["x", "moe,x", ",", "3"],
        "--sharding": ["x", "", "zero3"], "--dispatcher": ["x", "", "pigeon"],
        "--capacity-factor": ["0", "-1", "x", "nan"], "--drop-scope": ["x", ""], "--dispatch-chunks": ["0", "-1", "x"],
        "--routing": ["x", "", "no/such.npz", "{folder}/odd.json", "/dev/null"], "--no-such": ["1"],
    }),
    (_VERIFY, {
        "--checkpoint": ["no/such", "", "/dev/null", "{folder}"], "--fold": ["tp3", "x", "ep7", "tp0", "tp2 | ep3"],
        "--ranks": ["0", "-1", "x", "1.5", "3"], "--steps": ["0", "-1", "x"], "--length": ["0", "-1", "x"],
        "--layers": ["0", "-1", "x", "99"], "--num-microbatches": ["0", "-1", "x"], "--sharding": ["x"],
        "--recompute": ["x", "moe,x"], "--exchange": ["x"],
        "--schedule": ["x", ""], "--stages-per-rank": ["0", "-1", "x"],
    }),
    (["balance", "rotating_hotspot", "--ep", "4"], {
        "--ep": [*_WHOLE, "7"], "--etp": _WHOLE, "--edp": _WHOLE, "--max-copies-per-rank": ["-1", "x", "1.5"],
        "--policies": ["x", "eplb,x", "", ","], "--model": ["x", "no/such"], "--hardware": ["x"], "--precision": ["x"],
        "--num-microbatches": _WHOLE, "--every": _WHOLE, "--window": _WHOLE,
    }),
    (["export", "--checkpoint", "{model}", "--output", "{folder}/out"], {
        "--checkpoint": _PATH, "--dtype": ["int8", "", "float"], "--model": ["no/such"],
    }),
    (["merge", "--checkpoint", "{model}", "--adapter", "{folder}", "--output", "{folder}/out"], {
        "--checkpoint": ["no/such", "", "/dev/null", "{folder}"], "--adapter": _PATH, "--dtype": ["int8", ""],
    }),
    (["generate", "--checkpoint", "{model}", "--prompts", "{folder}/prompts.txt"], {
        "--checkpoint": ["no/such", "", "/dev/null", "{folder}"], "--prompts": ["no/such", "/proc/self/mem"],
        "--max-new-tokens": _WHOLE, "--batch-size": _WHOLE, "--temperature": ["0", "-1", "x", "nan"], "--top-k": _WHOLE,
        "--top-p": ["0", "-1", "1.5", "x", "nan"], "--adapter": ["no/such"], "--seed": ["x", "1.5"],
    }),
    (["prune-experts", "--checkpoint", "{model}", "--keep", "0.5", "--output", "{folder}/out", "--data", "{folder}/prompts.txt"], {
        "--checkpoint": ["no/such", "", "{folder}"], "--keep": ["0", "-1", "1.5", "x", "nan"], "--score": ["x", ""],
    }),
    (["upcycle", "--checkpoint", "{model}", "--output", "{folder}/out"], {
        "--checkpoint": ["no/such", "", "{folder}", "{model}"], "--experts": _WHOLE, "--top-k": [*_WHOLE, "99"],
        "--granularity": [*_WHOLE, "3"], "--noise": ["-1", "x", "nan"], "--router-std": ["-1", "x", "nan"], "--seed": ["x"],
    }),
    (["plot", "{folder}"], {"--no-such": ["1"], "": ["no/such", "/dev/null", "{folder}/odd.json"]}),
    ([], {"": ["no-such-command", "Plan", "fitt", "--plan"]}),
]  # fmt: skip
#: Keys of a configuration of ``moefold fit``.
FIT: dict[str, list[str]] = {
    "trainer.devices": ["-2", "x", "1.5", "0"], "trainer.max_steps": ["-2", "x", "1.5"], "trainer.precision": ["fp7", "8"],
    "trainer.max_epochs": ["-2", "x"], "trainer.accumulate_grad_batches": ["0", "-1", "x"], "trainer.no_such": ["1"],
    "trainer.gradient_clip_val": ["-1", "x"], "trainer.strategy": ["no_such", "moefould"],
    "trainer.val_check_interval": ["x", "-1"], "trainer.strategy.init_args.fold": ["tp3", "x", "ep7", "tp2 | ep3"],
    "trainer.strategy.init_args.no_such": ["1"],
    "trainer.strategy.init_args.num_microbatches": ["0", "-1", "x"], "trainer.strategy.init_args.dispatcher": ["x"],
    "trainer.strategy.init_args.capacity_factor": ["0", "-1", "x"], "trainer.strategy.init_args.recompute": ["x", "[moe,x]"],
    "trainer.strategy.init_args.checksums": ["x", "2"], "trainer.strategy.init_args.timeout": ["x"],
    "model.checkpoint": ["no/such", "/dev/null", "{folder}"], "model.learning_rate": ["-1", "x", "nan"], "model.schedule": ["x"],
    "model.warmup_steps": ["-1", "x", "1.5"], "model.betas": ["[2,0]", "x", "[0.9]"], "model.weight_decay": ["-1", "x"],
    "model.total_steps": ["0", "-1", "x"], "model.no_such": ["1"], "model.adapter": ["{rank: 0}", "{rnk: 3}", "x", "{rank: x}"],
    "model.config_overrides": ["{no_such: 1}", "x", "{num_hidden_layers: -1}", "{hidden_size: a}"],
    "model.freeze": ["['no.such.*']"], "data.files": ["no/such.txt", "[]", "{folder}/odd.bin", "/dev/null"],
    "data.tokenizer": ["no/such", "{folder}"],
    "data.sequence_length": ["0", "-1", "x", "1.5"], "data.batch_size": ["0", "-1", "x", "3.5"], "data.packing": ["x"],
    "data.val_fraction": ["-1", "1.5", "x", "nan"], "data.train_on": ["x"], "data.weights": ["[0]", "[1,2]", "[-1]", "x"],
    "data.no_such": ["1"], "ckpt_path": ["no/such.ckpt", "{model}", "{folder}"], "no_such": ["1"], "seed_everything": ["x", "-1"],
}  # fmt: skip


class _Hangs(BaseException):
    pass


def _alarm(*_: Any) -> None:
    raise _Hangs


class Case:
    """A request to make.

    Args:
        said: The request, for reports.
        make: Makes it; what it returns is the exit status, None where errors are exceptions.
    """

    def __init__(self, said: str, make: Any) -> None:
        self.said, self.make = said, make


def judge(case: Case) -> tuple[str, str]:
    """Makes a request; returns what happened and what was said."""
    output, errors = io.StringIO(), io.StringIO()
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = case.make()
    except _Hangs:
        return "HANG", ""
    except MoEFoldError as error:
        return ("refused" if _is_sentence(str(error)) else "CRASH"), f"{type(error).__name__}: {error}"
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        return "CRASH", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if status is None or status == 0:
        return "ACCEPTED", ""
    # argparse writes its usage first.
    lines = [line for line in errors.getvalue().strip().splitlines() if line]
    said = lines[next((i for i, line in enumerate(lines) if not line.startswith(("usage:", " "))), 0) :]
    ok = status == 2 and len(said) == 1 and _is_sentence(said[0])
    return ("refused" if ok else "CRASH"), f"status {status}: " + "\n".join(said[-12:])


def _is_sentence(text: str) -> bool:
    return 0 < len(text) <= 600 and "\n" not in text and "Traceback" not in text


class Cases:
    """Draws requests.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        from tests.recipes.chats import chat_tokenizer

        self.folder, self.model = folder / "odd", folder / "model"
        self.folder.mkdir()
        make_checkpoint(self.model, "qwen3_moe", num_experts=4, vocab_size=128)
        chat_tokenizer(folder / "tokenizer", None)
        for path in (folder / "tokenizer").iterdir():
            if not (self.model / path.name).exists():
                path.rename(self.model / path.name)
        (self.folder / "odd.json").write_text('{"a": [1, {"b": null}]}')
        (self.folder / "odd.bin").write_bytes(bytes(range(256)))
        (self.folder / "prompts.txt").write_text("hello\n" * 50)
        self.config = MoEConfig.from_pretrained(self.model)

    def strategy(self, draw: random.Random) -> Case:
        name = draw.choice(sorted(STRATEGY))
        others = {other: draw.choice(LEGAL[other]) for other in draw.sample(sorted(LEGAL), 2) if other != name}
        arguments = {**others, name: draw.choice(STRATEGY[name])}
        return Case(f"MoEFoldStrategy({arguments})", lambda: self._strategy(arguments))

    def _strategy(self, arguments: dict[str, Any]) -> None:
        strategy = MoEFoldStrategy(**arguments)
        environment = LightningEnvironment()
        environment.set_world_size(8)
        strategy.cluster_environment = environment
        if arguments.get("fold") != "auto":
            fold: Fold = strategy._make_fold()
            fold.validate(self.config)
            if fold != Fold(8):
                return
        trainer = pl.Trainer(
            strategy=MoEFoldStrategy(**arguments), accelerator="cpu", devices=1, max_steps=1, logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, default_root_dir=self.folder,
        )  # fmt: skip
        trainer.fit(Finetune(self.model), [{"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}])

    def cli(self, draw: random.Random) -> Case:
        legal, options = draw.choice(CLI)
        option = draw.choice(sorted(options))
        value = draw.choice(options[option])
        words = list(legal)
        if not option:
            words = [*legal[:1], value] if legal else [value]
        elif option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
        words = [word.replace("{folder}", str(self.folder)).replace("{model}", str(self.model)) for word in words]
        return Case(f"moefold {words}", lambda: moefold(words))

    def fit(self, draw: random.Random) -> Case:
        from tests.recipes.running import arguments

        key = draw.choice(sorted(FIT))
        value = draw.choice(FIT[key]).replace("{folder}", str(self.folder)).replace("{model}", str(self.model))
        words = arguments(
            self.folder, self.folder / "run", model__checkpoint=self.model, data__tokenizer=self.model, trainer__max_steps=1,
            data__files=json.dumps([str(self.folder / "prompts.txt")]), trainer__devices=1, data__sequence_length=16,
            trainer__strategy__init_args__fold="", data__batch_size=2,
        )  # fmt: skip
        if f"--{key}" in words:
            words[words.index(f"--{key}") + 1] = value
        else:
            words += [f"--{key}", value]
        return Case(f"moefold fit ... --{key} {value}", lambda: fit.run("fit", words))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of all surfaces together")
    parser.add_argument("--surfaces", nargs="+", choices=("strategy", "cli", "fit"), default=["strategy", "cli", "fit"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder))
        for surface in arguments.surfaces:
            begin, counts, seen = time.monotonic(), Counter[str](), set()
            count = arguments.cases // len(arguments.surfaces)
            for seed in range(arguments.seed, arguments.seed + count):
                case = getattr(cases, surface)(random.Random(f"{surface} {seed}"))
                outcome, said = judge(case)
                counts[outcome] += 1
                if outcome != "refused" and case.said not in seen:
                    seen.add(case.said)
                    print(f"{surface}, case {seed}: {outcome}: {case.said}: {said[:700]}", flush=True)
            faults += count - counts["refused"]
            print(f"{surface}: {count} requests in {time.monotonic() - begin:.0f} s: {dict(counts)}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
