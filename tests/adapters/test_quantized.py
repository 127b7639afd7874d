# SPDX-License-Identifier: Apache-2.0
"""Adapters on a base in fewer bytes: under every fold what PEFT computes with the rounded weights in one process."""

from __future__ import annotations

import re
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold import Fold, LoRA, MoECausalLM
from lightning_moefold.adapters.attach import is_adapter
from lightning_moefold.callbacks.summary import summarize_model
from lightning_moefold.callbacks.work import WorkModel
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.cli.main import main
from lightning_moefold.errors import FoldError, InputError, PlanError, UnsupportedFeature
from lightning_moefold.lifecycle.fold_choice import _frozen_base
from lightning_moefold.lifecycle.unsupported import check_trainer
from lightning_moefold.models.blocks import check_blocks
from lightning_moefold.modules.quantization import BITS, QUANTIZATIONS
from lightning_moefold.modules.quantized import Codec, CodedStack, coded_weights
from lightning_moefold.parallel.apply import check_compiler
from lightning_moefold.parallel.settings import Settings
from lightning_moefold.planner import PRESETS, CostModel, Job
from lightning_moefold.planner.cost.schedules import pipeline_layout
from lightning_moefold.planner.search.search import Planner
from lightning_moefold.recipes import FineTuneModule
from lightning_moefold.testing import RankError, RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.adapters.made import make_adapter
from tests.adapters.rounded import round_checkpoint, round_weight
from tests.adapters.test_folds import ROW
from tests.checkpoint import jobs_resume
from tests.exactness import compare, matrix
from tests.quick import quick

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "intermediate_size": 128,
}

CASES = [
    ("tp2 | etp2", "int8", {"sharding": "full", "recompute": ("expert_activation",)}),
    ("tp2 | etp2 ep2", "nf4", {"dispatch": "chunks", "padding": "left", "sharding": "none"}),
    (" | ep2", "nf4", {"family": "qwen3_moe", "accumulate": 2, "recompute": "full"}),
    ("cp2 | etp2", "int8", {"family": "mixtral", "recompute": "selective", "offload": True}),
    ("tp2 cp2 | ep4", "nf4", {"family": "mixtral"}),
    ("pp2 | ep2", "nf4", {"microbatches": 2, "sharding": "none"}),
    ("pp2 tp2 | etp2", "int8", {"microbatches": 2, "schedule": "zbv", "family": "qwen3_moe"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


def base_of(folder: Path, family: str, layers: int) -> Path:
    path = folder / f"{family}-{layers}"
    if not path.exists():
        widths = {"shared_expert_intermediate_size": 128} if family == "qwen2_moe" else {}
        widths |= {} if family == "mixtral" else {"moe_intermediate_size": 128}
        widths |= {"num_attention_heads": 32} if family == "qwen3_moe" else {}  # of 12 numbers
        make_checkpoint(path, family, num_hidden_layers=layers, **SIZES | widths)
    return path


@pytest.mark.parametrize(("fold", "kind", "factors"), quick(CASES, CASES[0]), ids=[f"{f} {k}" for f, k, _ in CASES])
def test_folds(pool: RankPool, folder: Path, fold: str, kind: Any, factors: dict[str, Any]) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    row, parsed = {**ROW, "shape": "12 experts", **factors}, Fold.parse(fold, 2 if fold == "tp2 | etp2" else 4)
    base = base_of(folder, row["family"], matrix.layers(parsed, row))
    rounded = round_checkpoint(base, folder / f"{base.name}-{kind}", kind)
    adapter = folder / f"{base.name}-adapter"
    if not adapter.exists():
        make_adapter(adapter, base)
    batches = compare.draw_batches(
        parsed, row, row["accumulate"] * (compare.STEPS - (row["accumulate"] > 1)), 97, length=5
    )
    row |= {"adapter": str(adapter), "quantize": kind, "rounded": rounded}
    compare.check_run(pool, base, parsed, row, [], batches)


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["tp2 | ep2 etp2", "tp2 pp2 | ep2"])
def test_dora(pool: RankPool, folder: Path, fold: str) -> None:
    row, parsed = {**ROW, "shape": "12 experts", "microbatches": 2, "sharding": "none"}, Fold.parse(fold, 4)
    base = base_of(folder, "qwen2_moe", matrix.layers(parsed, row))
    rounded, adapter = round_checkpoint(base, folder / f"{base.name}-int8", "int8"), folder / f"{base.name}-dora"
    if not adapter.exists():
        make_adapter(adapter, base, use_dora=True, target_parameters=None, rank_pattern={})
    batches = compare.draw_batches(parsed, row, compare.STEPS, 97, length=5)
    row |= {"adapter": str(adapter), "quantize": "int8", "rounded": rounded}
    compare.check_run(pool, base, parsed, row, [], batches)


def test_bfloat16(folder: Path) -> None:
    """The bits of a base in bfloat16 with the rounded weights, gradients included."""
    base, ids = (
        base_of(folder, "qwen2_moe", 2),
        torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0)),
    )
    rounded = MoECausalLM.from_pretrained(round_checkpoint(base, folder / f"{base.name}-int8", "int8"), torch.bfloat16)
    model = MoECausalLM.from_pretrained(base, torch.bfloat16, quantize="int8")
    grads = []
    for part in (model, rounded):
        part.add_adapter(LoRA(rank=2, targets=["o_proj", "down_proj", "experts"]))
        part(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in part.named_parameters() if p.requires_grad})
    assert all(p.dtype == torch.float32 for p in grads[0].values())
    different = [name for name, grad in grads[1].items() if not torch.equal(grads[0][name], grad)]
    assert not different


def test_dora_starts_with_rounded_rows(folder: Path) -> None:
    base = base_of(folder, "qwen2_moe", 2)
    rounded = MoECausalLM.from_pretrained(round_checkpoint(base, folder / f"{base.name}-int8", "int8"))
    model = MoECausalLM.from_pretrained(base, quantize="int8")
    for part in (model, rounded):
        part.add_adapter(LoRA(rank=2, use_dora=True))
    for layer in ("0", "1"):
        ours, theirs = (m.model.layers[layer].self_attn.o_proj.lora_magnitude for m in (model, rounded))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codec(kind: Any) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    weight[3, 64:128] = 0
    codec = Codec(kind, torch.float32)
    expected = round_weight(weight, kind)
    expected[3, 64:128] = 0
    stored = codec.encode(weight)
    assert stored.numel() * 8 == weight.numel() * BITS[kind]
    assert stored.shape == codec.room(weight.shape, weight.device).shape
    torch.testing.assert_close(codec.decode(stored, (48, 192), torch.float64), expected.double(), rtol=1e-6, atol=0)
    for dtype in (torch.bfloat16, torch.float32):  # one rounding, and what is rounded is rounded no further
        again = codec.decode(codec.encode(expected.to(dtype)), (48, 192), dtype)
        torch.testing.assert_close(again, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(
        codec.decode(stored, (48, 192), torch.bfloat16),
        codec.decode(stored, (48, 192), torch.float32).bfloat16(),
        rtol=0,
        atol=0,
    )
    # A cut of inputs at a block, or of outputs anywhere, is a cut of what is stored.
    for part in (weight[:, 64:], weight[5:17]):
        cut = codec.decode(codec.encode(part), tuple(part.shape), torch.float32)
        place = (slice(None), slice(64, None)) if part.shape[0] == 48 else (slice(5, 17), slice(None))
        torch.testing.assert_close(cut, codec.decode(stored, (48, 192), torch.float32)[place], rtol=0, atol=0)


class _Made(TorchDispatchMode):
    """Keeps the tensors that are made, and the bytes of each by its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in [result] if isinstance(result, Tensor) else []:
            self.tensors.append(tensor)
            self.bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_stack_is_decoded_in_its_place(kind: Any, dtype: torch.dtype) -> None:
    """To the bits of its matrices one by one, and without a second copy of the stack."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    codec = Codec(kind, dtype)
    weight_LOI = torch.randn(8, 16, 128, generator=torch.Generator().manual_seed(0))
    stack = CodedStack(torch.stack([codec.encode(weight_OI) for weight_OI in weight_LOI]), (16, 128), codec, dtype)
    with _Made() as made:
        whole = stack.whole()
    assert torch.equal(whole, torch.stack([stack[expert] for expert in range(8)]))
    assert [size for size in made.bytes.values() if size >= whole.nbytes] == [whole.nbytes]


def test_what_is_bytes(folder: Path) -> None:
    base = base_of(folder, "qwen2_moe", 2)
    whole = MoECausalLM.from_pretrained(base)
    model = MoECausalLM.from_pretrained(base, quantize="int8")
    coded = {name: module.get_buffer(leaf) for name, module, leaf in coded_weights(model)}
    kept = dict(model.named_parameters())
    assert coded.keys() | kept.keys() == dict(whole.named_parameters()).keys()
    assert not coded.keys() & kept.keys()
    numbers = sum(whole.get_parameter(name).numel() for name in coded)
    of_experts = model.model.layers["1"].mlp.experts
    assert of_experts.numbers_in_bytes == sum(p.numel() for p in whole.model.layers["1"].mlp.experts.parameters())
    assert sum(b.nbytes for b in coded.values()) * 8 == numbers * 8.5
    assert not any(name in coded for name in model.state_dict())
    left = {re.sub(r"model.layers.\d.", "", name) for name in kept if not name.endswith("bias")}
    assert left == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "input_layernorm.weight",
        "post_attention_layernorm.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight",
    }  # fmt: skip


@pytest.mark.parametrize("targets", [["experts"], ["q_proj", "o_proj", "gate_proj", "down_proj"]])
def test_nothing_decoded_is_kept(folder: Path, targets: list[str]) -> None:
    """Between forward and backward there are as many bytes as with a base of numbers."""
    base, ids = (
        base_of(folder, "qwen2_moe", 2),
        torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0)),
    )
    found = {}
    for kind in (None, "int8"):
        model = MoECausalLM.from_pretrained(base, quantize=kind, output_router_logits=True)  # type: ignore[arg-type]
        model.add_adapter(LoRA(rank=2, targets=targets))
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept |= {} if storage.data_ptr() in own else {storage.data_ptr(): storage.nbytes()}
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        loss.backward()
        found[kind] = sum(kept.values())
    assert found["int8"] <= found[None]


@pytest.mark.slow
def test_a_run(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    """Its checkpoints hold the adapter, resume under other folds, and are exported with the base as it was."""
    base = str(base_of(folder, "qwen2_moe", 2))
    lora = {"rank": 4, "expert_rank": 2, "targets": ["q_proj", "o_proj", "down_proj", "gate", "experts"]}
    spec: dict[str, Any] = {"adapter": lora, "quantize": "int8"}
    full = pool.run(jobs_resume.save_and_go_on, base, "tp2 | etp2", spec, str(tmp_path), ranks=2)
    weights = assemble(report.weights for report in full)
    checkpoint = tmp_path / "step=3.ckpt"
    held = {n.removeprefix("model.model.") for n in StoredTensors(checkpoint, {}).items if n.startswith("model.")}
    assert held == {n for n in weights if is_adapter(n)}
    resumed = pool.run(jobs_resume.resume, base, ["tp2 | etp2 ep2", "pp2 | ep2"], spec, str(checkpoint), ranks=4)
    for number in range(2):
        reports = [run[number] for run in resumed]
        assert reports[0].losses == pytest.approx(full[0].losses[3:], rel=1e-9)
        assert_close_by_name(assemble(r.weights for r in reports), weights, 1e-9, "weights")
    with pytest.raises(RankError) as caught:
        pool.run(jobs_resume.resume, base, ["tp2 | etp2"], {"adapter": lora}, str(checkpoint), ranks=2)
    assert all("quantize='int8', and the model has quantize=None" in m for m in caught.value.messages.values())
    assert (
        main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "whole"), "--dtype", "float64"])
        == 0
    )
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", Path(base)))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 1e-6 < float((ours[name] - theirs[name].double()).abs().max()) < 1
    assert torch.equal(
        ours["model.layers.0.self_attn.k_proj.weight"], theirs[name.replace("q_proj", "k_proj")].double()
    )


def test_callbacks_count_it(folder: Path) -> None:
    """As many parameters and FLOPs as with a base of numbers, in fewer bytes."""
    found = {}
    for kind in (None, "int8"):
        model = MoECausalLM.from_pretrained(base_of(folder, "qwen2_moe", 2), quantize=kind)  # type: ignore[arg-type]
        model.add_adapter(LoRA(rank=2, targets=["q_proj", "experts"]))
        summary = summarize_model(model, Fold(1))
        found[kind] = (
            summary,
            WorkModel(model, None, False)._flops_per_token(64, WorkModel(model, None, False)._frozen()),
        )
    (numbers, flops), (coded, same) = found[None], found["int8"]
    assert coded.rows() == numbers.rows()
    assert same == flops
    layouts = model.coded_layouts.values()
    assert numbers.weight_bytes[0] - coded.weight_bytes[0] == sum(prod(x.shape) for x in layouts) * (4 - 8.5 / 8)


def test_planned_bytes(folder: Path) -> None:
    """The planner counts the bytes that a model holds."""
    config = MoECausalLM.from_pretrained(base_of(folder, "qwen2_moe", 2), quantize="int8").config
    for kind in QUANTIZATIONS:
        memory = CostModel(Job(config, 1, PRESETS["dgx-h100"], 1, 8, lora_rank=4, quantize=kind)).memory
        numbers = MoECausalLM.from_pretrained(base_of(folder, "qwen2_moe", 2), quantize="int8")
        held = sum(module.get_buffer(leaf).nbytes for _, module, leaf in coded_weights(numbers))
        assert (
            memory.quantized_bytes(1, 1, 1, pipeline_layout(config, 1, 1, "1f1b")[0])
            == held * BITS[kind] / BITS["int8"]
        )
        left = sum(p.numel() for p in numbers.parameters())
        counted = memory.parameters(1, 1, 1, pipeline_layout(config, 1, 1, "1f1b")[0])
        assert counted.dense + counted.expert == left
    model = pl.LightningModule()
    model.model = MoECausalLM.from_pretrained(base_of(folder, "qwen2_moe", 2), quantize="int8")
    assert _frozen_base(model, model.model.config) == {}
    model.model.add_adapter({"rank": 3})
    assert _frozen_base(model, model.model.config) == {"quantize": "int8", "lora_rank": 3}
    search = Planner(Job(config, 4, PRESETS["dgx-h100"], 4, 8, lora_rank=3, quantize="int8"))
    assert {fold.etp for _, fold, _ in search.bounded()} == {1, 2}  # four would cut inside a block
    with pytest.raises(PlanError, match="give lora_rank too"):
        Job(config, 1, PRESETS["dgx-h100"], 1, 8, quantize="nf4")


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(folder, "qwen2_moe", 2)
    with pytest.raises(InputError, match="quantize='int3' is not available; use 'nf4' or 'int8'"):
        MoECausalLM.from_pretrained(base, quantize="int3")  # type: ignore[arg-type]
    model = MoECausalLM.from_pretrained(base, quantize="int8")
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="add an adapter"):
        model(ids, labels=ids)
    assert model(ids).logits.isfinite().all()  # which is no training
    with pytest.raises(InputError, match="save_adapter, and moefold merge"):
        model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert model.eval()(ids, labels=ids).loss.isfinite()
    for fold, words in (("tp4", "over tp=4 is no multiple of the 64"), ("| etp4", "use etp in \\[1, 2\\]")):
        with pytest.raises(FoldError, match=words):
            check_blocks(model.config, Fold.parse(fold, 4))
    with pytest.raises(InputError, match="hidden_size=32 is no multiple"):
        MoECausalLM.from_config(make_checkpoint(tmp_path / "narrow", "mixtral"), quantize="int8")
    with pytest.raises(InputError, match="give an adapter too"):
        FineTuneModule(str(base), quantize="int8")
    with pytest.raises(InputError, match="is not available"):
        FineTuneModule(str(base), quantize="nf8", adapter={"rank": 2})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="compile=True does not compile"):
        check_compiler(model, Settings(compiler="inductor"))
    experts = model.model.layers["0"].mlp.experts
    with pytest.raises(InputError, match="expert_kernel='fp8' does not compute with quantize"):
        experts.check_kernel("fp8", Fold(1), torch.bfloat16, torch.device("cpu"))
    assert "quantize='int8'" in str(experts.bound_to_place(128))
    module = pl.LightningModule()
    module.model = model
    for averages, refused in ((EMAWeightAveraging(), True), (EMAWeightAveraging(use_buffers=False), False)):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[averages])
        with pytest.raises(UnsupportedFeature, match="use_buffers=False") if refused else nullcontext():
            check_trainer(trainer, module, Fold(1))
    monkeypatch.setattr("lightning_moefold.modules.quantized.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'lightning-moefold\[quantized\]'"):
        MoECausalLM.from_pretrained(base, quantize="nf4")
