# SPDX-License-Identifier: Apache-2.0
"""``moefold fit``, ``validate``, ``test``, ``predict`` and ``export``, as a user types them."""

from __future__ import annotations

import contextlib
import filecmp
import inspect
import io
import json
import os
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.checkpoint.sharded import load_meta
from lightning_moefold.cli import fit
from lightning_moefold.cli.main import main
from lightning_moefold.recipes import FineTuneModule, TextData
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.recipes.running import CONFIG, ROOT, arguments, logged, restored
from tests.strategy.plain_modules import trainer

# Lightning calls functions of jsonargparse that the next one has no more.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning.pytorch.cli")


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Is as it was before a command."""
    with restored():
        yield


def shown(path: Path) -> str:
    """A path as a command run in ROOT prints it."""
    return min(os.path.relpath(path, ROOT), str(path), key=len)


def in_pool(argv: list[str]) -> int:
    """Runs a command on a rank of the pool."""
    with restored():
        return main([*argv, "--trainer.plugins", '[{"class_path": "lightning_moefold.testing.PoolEnvironment"}]'])


@pytest.mark.more
@pytest.mark.parametrize("by", ["file", "argument"])
def test_defaults_are_those_of_the_class_that_is_named(tmp_path: Path, capsys: Any, by: str) -> None:
    """The learning rate of another module is not that of FineTuneModule, nor is what it shares with it."""
    named = {
        key: f"lightning_moefold.recipes.Preference{kind}" for key, kind in (("model", "Module"), ("data", "Data"))
    }
    given = {"model": {"checkpoint": "here"}, "data": {"files": ["a.jsonl"], "tokenizer": "here"}}
    if by == "file":
        config = {key: {"class_path": named[key], "init_args": values} for key, values in given.items()}
        words = ["--config", str(tmp_path / "run.yaml")]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    else:
        values = ["--model.checkpoint", "here", "--data.files", "[a.jsonl]", "--data.tokenizer", "here"]
        words = ["--model", named["model"], "--data", named["data"], *values]
    with contextlib.suppress(SystemExit):
        main(["fit", *words, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    module = printed["model"]["init_args"]
    assert (module["learning_rate"], module["calculate_per_token_loss"]) == (1e-6, False)
    assert printed["data"]["init_args"]["kind"] == "preference"


def in_pool_with_output(argv: list[str]) -> tuple[int, str, str]:
    """The same, with what it prints and warns of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")  # whatever the pool's earlier work has silenced
        status = in_pool(argv)
    return status, out.getvalue(), err.getvalue()


def save_for_transformers(folder: str, checkpoint: str, output: str) -> None:
    """What export should write, by the ranks that hold the model."""
    module = FineTuneModule(f"{folder}/checkpoint")
    data = TextData([f"{folder}/b.jsonl"], f"{folder}/checkpoint", 64, 4, cache_dir=f"{folder}/tokens")
    run = trainer(MoEFoldStrategy(fold="ep2"), limit_val_batches=1)
    run.validate(module, data, ckpt_path=checkpoint, verbose=False)
    module.model.save_pretrained(output)


@pytest.mark.more
def test_the_example_from_fit_to_transformers(
    pool: RankPool, folder: Path, tmp_path: Path, fitted: tuple[Path, subprocess.CompletedProcess[str]], capsys: Any
) -> None:
    first, done = fitted
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = logged(first, 0)
    for name in ("train/loss", "train/aux_loss", "val/loss", "val/perplexity", "train/mfu", "moe/load_imbalance"):
        assert any(row.get(name) for row in rows), name
    val = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(val) == 4
    assert val[-1] < val[0]
    assert done.stdout.count("val/loss") == 4
    assert done.stdout.count("Fold ") == 1
    best_line, resume_line, export_line = done.stdout.splitlines()[-3:]
    best = next((first / "lightning_logs" / "version_0" / "checkpoints").glob("step*"))
    assert best_line.split() == ["best", "checkpoint", shown(best)]
    assert resume_line.split() == ["to", "resume", "from", shown(best.with_name("last.ckpt"))]
    saved = yaml.safe_load((first / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert saved["trainer"]["strategy"]["init_args"]["fold"] == "tp2 | ep2"

    last = str(first / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt")
    measured = arguments(folder, tmp_path, trainer__strategy__init_args__fold="ep2")
    for version, name in enumerate(("validate", "test", "predict")):
        extra = ["--ckpt_path", last]
        outcomes = pool.run(in_pool_with_output, [name, *measured, *extra], ranks=2)
        assert [status for status, _, _ in outcomes] == [0, 0]
        assert not any("predict returned None" in said for _, _, said in outcomes)
        if name == "predict":
            printed = outcomes[0][1]
        else:
            [row] = logged(tmp_path, version)
            key = "val/loss" if name == "validate" else "test/loss"
            assert float(row[key]) == pytest.approx(val[-1], rel=1e-5)
    documents = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    total = sum(document["loss"] * document["tokens"] for document in documents)
    assert total / sum(document["tokens"] for document in documents) == pytest.approx(val[-1], rel=1e-5)

    assert printed.split() == [
        "predictions", shown(tmp_path / "predictions.jsonl"), f"({len(documents)}", "documents)"
    ]  # fmt: skip

    more = [*measured, "--ckpt_path", last, "--trainer.max_epochs", "2", "--trainer.val_check_interval", "3"]
    outcomes = pool.run(in_pool_with_output, ["fit", *more], ranks=2)
    assert [status for status, _, _ in outcomes] == [0, 0]
    assert not any("dirpath has changed" in said for _, _, said in outcomes)
    before = [int(row["step"]) for row in rows if row["train/loss"]]
    [version] = sorted(path.name for path in (tmp_path / "lightning_logs").iterdir() if (path / "checkpoints").exists())
    after = [int(row["step"]) for row in logged(tmp_path, version) if row["train/loss"]]
    assert after == [step + len(before) for step in before]
    # The steps after an epoch's last validation are in last.ckpt.
    assert len(before) % 3
    newest = tmp_path / "lightning_logs" / version / "checkpoints" / "last.ckpt"
    assert load_meta(newest)["global_step"] == 2 * len(before)
    third = [*measured, "--ckpt_path", str(newest), "--trainer.max_epochs", "3", "--trainer.default_root_dir"]
    assert pool.run(in_pool, ["fit", *third, str(tmp_path / "third")], ranks=2) == [0, 0]
    after = [int(row["step"]) for row in logged(tmp_path / "third", 0) if row["train/loss"]]
    assert after == [step + 2 * len(before) for step in before]

    exported, expected = tmp_path / "exported", tmp_path / "expected"
    assert main(["export", "--checkpoint", last, "--output", str(exported)]) == 0
    capsys.readouterr()
    pool.run(save_for_transformers, str(folder), last, str(expected), ranks=2)
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in exported.iterdir()) == names
    assert "tokenizer.json" in names
    assert filecmp.cmpfiles(exported, expected, [n for n in names if n != "config.json"], shallow=False)[1:] == ([], [])
    tokens = AutoTokenizer.from_pretrained(exported)("The statement is executed", return_tensors="pt")["input_ids"]
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(exported)(tokens).logits).all()
    assert main(["export", "--checkpoint", last, "--output", str(exported), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16
    assert export_line.split()[:3] == ["for", "transformers", "moefold"]


# ---- the configuration -------------------------------------------------------------------------------------------


class Recording(MoEFoldStrategy):
    """Remembers its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = kwargs
        super().__init__(*args, **kwargs)


class NotRun(fit.MoEFoldCLI):
    """Makes everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


#: For each argument of the strategy a value other than its default, as YAML and as it should arrive.
VALUES: dict[str, tuple[Any, Any]] = {
    "tensor_parallel_size": (2, 2),
    "context_parallel_size": (2, 2),
    "pipeline_parallel_size": (2, 2),
    "expert_parallel_size": (2, 2),
    "expert_tensor_parallel_size": (2, 2),
    "num_microbatches": (4, 4),
    "pipeline_schedule": ("interleaved_1f1b", "interleaved_1f1b"),
    "num_stages_per_rank": (2, 2),
    "pipeline_split": ([1, 2, 2, 1], [1, 2, 2, 1]),
    "dispatcher": ("auto", "auto"),
    "capacity_factor": (1.25, 1.25),
    "pad_to_capacity": (True, True),
    "dispatch_chunks": (2, 2),
    "node_size": (2, 2),
    "expert_kernel": ("loop", "loop"),
    "recompute": (["moe", "attention"], ["moe", "attention"]),
    "offload_activations": (True, True),
    "context_parallel_exchange": ("ring", "ring"),
    "data_parallel_sharding": ("full", "full"),
    "drop_policy": ("position", "position"),
    "drop_scope": ("sub_sequence", "sub_sequence"),
    "sequence_parallel": (True, True),
    "calculate_per_token_loss": (True, True),
    "compile": (True, True),
    "checksums": (False, False),
    "async_save": (True, True),
    "timeout": ("0:10:00", timedelta(minutes=10)),
    "process_group_backend": ("gloo", "gloo"),
}
#: These do not go with others: ``fold`` and ``auto`` stand for the sizes, copies of experts do not go with padding.
DEFAULTS = {"fold", "auto", "expert_copies"}


def test_every_argument_of_the_strategy_from_yaml(tmp_path: Path) -> None:
    parameters = list(inspect.signature(MoEFoldStrategy.__init__).parameters.values())[1:]
    assert {p.name for p in parameters} == VALUES.keys() | DEFAULTS
    assert not [p.name for p in parameters if p.name in VALUES and VALUES[p.name][1] == p.default]
    text = {p.name: VALUES.get(p.name, (p.default, p.default))[0] for p in parameters}
    expected = {p.name: VALUES.get(p.name, (p.default, p.default))[1] for p in parameters}
    strategy = {"class_path": f"{__name__}.Recording", "init_args": text}
    file = tmp_path / "all.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "trainer": {"strategy": strategy, "devices": 16, "accelerator": "cpu"},
                "model": {"init_args": {"checkpoint": "somewhere"}},
                "data": {"init_args": {"files": ["a.txt"], "tokenizer": "somewhere"}},
            }
        )
    )
    cli = NotRun(["fit", "--config", str(file)])
    assert cli.trainer.strategy.given == expected
    copies = {"policy": "llep", "max_copies_per_rank": 1}
    strategy["init_args"] = {"expert_parallel_size": 2, "expert_copies": copies}
    whole = yaml.safe_load(file.read_text())
    whole["trainer"] |= {"strategy": strategy, "devices": 2}
    file.with_name("copies.yaml").write_text(yaml.safe_dump(whole))
    asked = NotRun(["fit", "--config", str(file.with_name("copies.yaml"))])
    assert asked.trainer.strategy.settings.dispatch.copies == ExpertCopies("llep", 1)
    assert str(cli.trainer.strategy._make_fold()) == "tp2 cp2 dp2 pp2 | etp2 ep2 edp2"
    assert type(cli.model) is FineTuneModule
    assert type(cli.datamodule) is TextData
    cli = NotRun(["fit", "--config", str(file), "--trainer.strategy", "moefold", "--trainer.devices", "1"])
    assert type(cli.trainer.strategy) is MoEFoldStrategy
    cli = NotRun(
        ["fit", "--config", str(file), "--trainer.strategy=lightning_moefold.MoEFoldStrategy"]
        + [
            "--trainer.strategy.fold",
            "tp2 | ep4",
            "--trainer.devices",
            "4",
            "--model",
            "lightning.pytorch.demos.boring_classes.BoringModel",
        ]
        + ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule"]
    )
    assert str(cli.trainer.strategy._make_fold()) == "tp2 cp1 dp2 pp1 | etp1 ep4 edp1"
    assert type(cli.model).__name__ == "BoringModel"


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_the_commands_of_the_pages_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("moefold fit --config examples/finetune.yaml ")]
    assert commands
    for line in commands:
        cli = NotRun(shlex.split(line)[1:] + ["--trainer.accelerator", "cpu"])
        assert cli.datamodule.packing == "documents"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3\n"),
        (["--trainer.nonsense", "3"], "--trainer.nonsense 3\n"),
        (["--trainer.maxsteps", "3"], "--trainer.maxsteps 3; did you mean max_steps?\n"),
        (
            ["--trainer.strategy.nonsense", "3"],
            "'nonsense' is not accepted; --trainer.strategy.help lists the known ones\n",
        ),
        (["--trainer.strategy.num_microbatches", "x"], "num_microbatches: x is not int or null"),
        (["--trainer.strategy.num_microbatches", "0"], "num_microbatches=0 must be at least 1."),
        (["--trainer.strategy.tensor_parallel_size", "1.5"], "tensor_parallel_size: 1.5 is not int"),
        (["--trainer.strategy.timeout", "soon"], 'timeout: Not of type timedelta: Expected a string with form "h:m:s"'),
        (["--trainer.strategy.drop_policy", "x"], "drop_policy: x is not Literal['probs', 'position']"),
        (["--trainer.strategy.pipeline_schedule", "x"], "pipeline_schedule='x' is not known; use "),
        (["--trainer.strategy.fold", "tp3"], "tensor_parallel_size=3"),
        (["--trainer.strategy", "moefolt"], "invalid strategy name: `strategy='moefolt'`"),
        (["--trainer.max_steps", "many"], "trainer.max_steps: many is not int"),
        (["--model", "nowhere.Module"], "No module named 'nowhere'"),
        (["--model.learning_rat", "1"], "'learning_rat' is not accepted; did you mean learning_rate?\n"),
        (["--data.batchsize", "1"], "data: Option 'batchsize' is not accepted; did you mean batch_size?\n"),
        (["--data.packing", "dense"], "packing: dense is not Literal['blocks', 'documents']"),
        (["--data.val_fraction", "2"], "val_fraction=2.0 must be at least 0 and less than 1."),
        (["--config", "nofile.yaml"], "File does not exist"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    folder: Path, tmp_path: Path, capfd: Any, words: list[str], message: str
) -> None:
    assert main(["fit", *arguments(folder, tmp_path), *words]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moefold fit: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("\ntrainer:", "\ntrainr:", "; did you mean trainer?\n"),
        ("max_epochs: 1", "max_epoch: 1", "option 'trainer.max_epoch'; did you mean max_epochs?\n"),
        ("fold:", "fodl:", "trainer.strategy: Option 'fodl' is not accepted; did you mean fold?\n"),
        ("moefold.MoEFold", "moefold.MoeFold", "no attribute 'MoeFoldStrategy'; did you mean MoEFoldStrategy?\n"),
        ("LoadBalanceM", "LoadBalancM", "no attribute 'LoadBalancMonitor'; did you mean LoadBalanceMonitor?\n"),
        ("per_layer:", "per_layr:", "trainer.callbacks: Option 'per_layr' is not accepted; did you mean per_layer?\n"),
        ("devices: 4", "devices: four", "`devices` selected with `CPUAccelerator` should be an int > 0.\n"),
        ("clip_val: 1.0", "clip_val: a", "trainer.gradient_clip_val: a is not int or float or null\n"),
        ("init_args:\n    files", "init_arg:\n    files", "data: Option 'init_arg.files' is not accepted\n"),
        ("seed_everything: 1", "seed_everything: [1, 2", "Problems parsing config: "),
    ],
)
def test_a_wrong_line_of_the_file_is_one_sentence(
    tmp_path: Path, capfd: Any, written: str, instead: str, message: str
) -> None:
    text, file = CONFIG.read_text(), tmp_path / "wrong.yaml"
    assert written in text
    file.write_text(text.replace(written, instead))
    assert main(["fit", "--config", str(file), "--trainer.accelerator", "cpu"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("moefold fit: ")
    assert said.count("\n") == 1
    assert message in said
    assert len(said) < 300


def errors_of_commands(cases: list[list[str]]) -> list[tuple[int, str]]:
    """Exit status of each command, and what it said."""
    seen = []
    for argv in cases:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = in_pool(argv)
        seen.append((status, said.getvalue()))
    return seen


@pytest.mark.more
def test_wrong_input_ends_on_all_ranks(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    """The pool would see a rank that goes on waiting."""
    AutoTokenizer.from_pretrained(folder / "checkpoint").save_pretrained(tmp_path / "tokenizer")
    small = make_checkpoint(tmp_path / "small", "qwen2_moe", vocab_size=96)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model__checkpoint": tmp_path / "nowhere"}, "nowhere/config.json does not exist"),
        (
            {"data__files": '["none.txt"]'},
            "none.txt is no file; give .txt, .jsonl, .json or .parquet files, or a directory of",
        ),
        ({"data__tokenizer": small}, "holds no tokenizer that transformers can load."),
        (
            {"model__checkpoint": small, "data__tokenizer": tmp_path / "tokenizer"},
            "lie outside the vocabulary of 96; check that tokenizer and model belong together",
        ),
        ({"data__batch_size": 3, "trainer__strategy__init_args__fold": "ep2"}, "dealt evenly to 2 data ranks"),
        ({"model__freeze": '["*.expert.*"]'}, "no parameter is named like '*.expert.*'"),
        ({"ckpt_path": tmp_path / "none.ckpt"}, "none.ckpt does not exist; --ckpt_path last takes"),
        ({"trainer__strategy__init_args__fold": "ep3"}, "expert_parallel_size=3"),
    ]
    argvs = [["fit", *arguments(folder, tmp_path, **case)] for case, _ in cases]
    first, second = pool.run(errors_of_commands, argvs, ranks=2)
    assert [status for status, _ in [*first, *second]] == [2] * 2 * len(cases)
    for (_, said), (_, message) in zip(first, cases, strict=True):
        assert message in said
        assert said.startswith("moefold fit: ")
        assert said.count("\n") == 1
    assert not any(said for _, said in second)
