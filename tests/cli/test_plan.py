# SPDX-License-Identifier: Apache-2.0
"""``moefold plan``."""

import json

import pytest
import yaml

from lightning_moefold.cli.main import main

BASE = ["plan", "--model", "mixtral-8x22b", "--gpus", "128", "--hardware", "dgx-h100", "--global-batch-size", "256"]
BASE += ["--sequence-length", "4096", "--capacity-factor", "1"]


def test_json(capsys):
    assert main([*BASE, "--top", "3", "--json", "--routing", "balanced", "--sharding", "optimizer"]) == 0
    out = json.loads(capsys.readouterr().out)
    best = out["plans"][0]
    assert {"fold", "mfu", "step_time_s", "memory_bytes", "fits", "bound_by"} <= set(best)
    assert best["fits"]
    assert best["mfu"] >= 0.493
    assert out["plain_expert_parallel"]["fold"] in [p["fold"] for p in out["plans"]]
    assert set(out["pool"]) == {"balanced"}
    assert sum(best["times_s"].values()) == pytest.approx(best["step_time_s"])


def test_one_fold(capsys):
    assert main([*BASE, "--fold", "tp2 pp8 | ep8", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["plans"][0]
    assert best["fold"] == "tp2 cp1 dp8 pp8 | etp1 ep8 edp2"
    assert best["strategy"]["expert_parallel_size"] == 8
    assert best["num_microbatches"] * best["micro_batch_size"] * 8 == 256


def test_table_and_explanation(capsys, tmp_path):
    small = [
        "plan",
        "--model",
        "qwen1.5-moe-a2.7b",
        "--gpus",
        "8",
        "--global-batch-size",
        "16",
        "--dispatcher",
        "alltoall",
    ]
    assert main([*small, "--top", "2"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("Run tp")
    assert "on 8 GPUs (1 node of dgx-h100), batch" in table
    assert "strategy = MoEFoldStrategy(" in table
    assert "where the time goes" in table
    assert "plans are ranked by the mean of these" in table
    timeline = tmp_path / "trace.json"
    assert main([*BASE, "--explain", "tp2 pp8 | ep8", "--timeline", str(timeline)]) == 0
    text = capsys.readouterr().out
    for word in ("inside a node", "crosses", "expert product", "memory of the fullest rank", "MoEFoldStrategy("):
        assert word in text
    assert json.loads(timeline.read_text())["traceEvents"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--fold", "tp3"], "does not divide"), (["--fold", "ep16"], "num_experts=8"), (["--hardware", "tpu"], "not known"),
    (["--routing", "chaotic"], "neither a profile"), (["--micro-batch-size", "two"], "neither a positive number"),
    (["--model", "gpt-5"], "neither a directory"), (["--recompute", "norm,elsewhere"], "no part of a layer"),
    (["--master-weights"], "bf16-mixed stores none"), (["--lora", "0"], "at least 1"),
    (["--quantize", "nf4"], "give lora_rank too"),
])  # fmt: skip
def test_errors_are_one_line(capsys, arguments, message):
    assert main([*BASE, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_directory_with_a_config_alone(capsys, tmp_path):
    config = {
        "model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["plan", "--model", str(tmp_path), "--gpus", "8", "--hardware", "cpu", "--global-batch-size", "16"]
    assert main([*arguments, "--sequence-length", "128", "--precision", "32-true", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["fits"]


@pytest.mark.more
def test_an_impossible_request_says_what_would_help(capsys):
    arguments = ["plan", "--model", "qwen3-235b-a22b", "--gpus", "8", "--global-batch-size", "64"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "No plan fits" in out
    assert "It would fit on" in out
    assert "MoEFoldStrategy(" not in out


def test_a_configuration_that_moefold_fit_reads(capsys, tmp_path):
    """Batch, micro-batches and accumulation are those of the plan; a file that exists is not overwritten."""
    file = tmp_path / "plan.yaml"
    arguments = ["plan", "--model", "qwen1.5-moe-a2.7b", "--gpus", "8", "--global-batch-size", "64", "--top", "1"]
    arguments += ["--precision", "bf16-true", "--routing", "balanced", "--write-config", str(file)]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    found = yaml.safe_load(file.read_text())
    assert found["trainer"]["strategy"]["init_args"] == plan["strategy"]
    assert {k: v for k, v in found["trainer"].items() if k != "strategy"} == plan["trainer"]
    accumulated = found["trainer"].get("accumulate_grad_batches", 1)
    assert found["data"]["init_args"]["batch_size"] * accumulated == 64
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_given_settings_are_kept(capsys):
    given = [
        "--fold",
        "tp2 pp4 | ep8",
        "--schedule",
        "interleaved_1f1b",
        "--stages-per-rank",
        "2",
        "--micro-batch-size",
        "2",
    ]
    assert main([*BASE, *given, "--recompute", "selective", "--lora", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert (plan["schedule"], plan["num_stages_per_rank"], plan["micro_batch_size"]) == ("interleaved_1f1b", 2, 2)
    assert (plan["recompute"], plan["sharding"], plan["dispatcher"]) == ("selective", "optimizer", "alltoall")


def test_a_base_in_fewer_bytes(capsys):
    given, memory = ["--fold", "| ep8", "--precision", "bf16-true", "--lora", "8", "--json"], {}
    for more in ([], ["--quantize", "nf4"], ["--quantize", "int8"]):
        assert main([*BASE, *given, *more]) in (0, 1)
        answer = json.loads(capsys.readouterr().out)
        memory[answer["job"]["quantize"]] = answer["plans"][0]["memory"]["weights"]
    assert memory["nf4"] < 0.6 * memory["int8"] < 0.4 * memory[None]
