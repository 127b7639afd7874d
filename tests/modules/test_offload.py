# SPDX-License-Identifier: Apache-2.0
"""What layers keep for backward travels to host memory and back with every bit; tried on CPU, where it is a plain copy."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.errors import InputError
from lightning_moefold.modules import offload
from lightning_moefold.parallel.apply import check_recompute, tell
from lightning_moefold.parallel.settings import Settings
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.exactness import compare, matrix
from tests.quick import quick


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1], num_experts=8)


def run(path: Path, offloaded: bool, recompute: Any, twice: bool = False) -> dict[str, torch.Tensor]:
    model = MoECausalLM.from_pretrained(path, dtype=torch.float64, output_router_logits=True)
    tell(model, Settings(recompute=recompute, offload=offloaded))
    ids = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss
    if twice:
        loss.backward(retain_graph=True)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


RECOMPUTES = [None, "full", "selective", ["norm"], ["norm", "expert_activation"], ["moe", "norm"]]


@pytest.mark.parametrize("recompute", quick(RECOMPUTES, None, "full", ["norm"]), ids=str)
def test_the_same_bits(checkpoint: Path, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(checkpoint, False, recompute)
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "SMALLEST", 0)
    went: list[tuple[int, ...]] = []
    make = offload._Kept.__init__

    def seen(self: Any, tensor: torch.Tensor, streams: Any) -> None:
        went.append(tuple(tensor.shape))
        make(self, tensor, streams)

    monkeypatch.setattr(offload._Kept, "__init__", seen)
    found = run(checkpoint, True, recompute)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(went) == 3 if recompute == "full" else len(went) > 9  # the inputs of the layers; more
    weights = {p.numel() for p in MoECausalLM.from_pretrained(checkpoint).parameters() if p.dim() > 1}
    assert not any(size[0] in weights for size in went)


def test_a_graph_that_is_kept(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "SMALLEST", 0)
    once, both = (run(checkpoint, True, None, twice) for twice in (False, True))
    assert len(once) > 30
    for name in once.keys() - {"loss"}:
        torch.testing.assert_close(both[name], 2 * once[name], rtol=1e-12, atol=1e-12)


CASES = [
    ("tp2 | ep2 etp2", {"recompute": ("norm",), "sharding": "full"}), ("cp2 | ep2", {"recompute": "full"}),
    ("pp2 | ep2", {"schedule": "zbv", "microbatches": 4}), ("pp2 tp2 | etp2", {"schedule": "1f1b", "microbatches": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("fold", "factors"), quick(CASES, CASES[0]), ids=[fold for fold, _ in CASES])
def test_folds(pool: RankPool, tmp_path: Path, fold: str, factors: dict[str, Any]) -> None:
    row = {**matrix.PLAIN, "exchange": "ring" if "cp" in fold else None, "offload": True, **factors}
    compare.check(pool, tmp_path, Fold.parse(fold, 4), row)


def test_nothing_to_offload() -> None:
    with pytest.raises(InputError, match="Linear holds none"):
        check_recompute(torch.nn.Linear(2, 2), Settings(offload=True))
    with pytest.raises(InputError, match="offload_activations='cpu'"):
        Settings(offload="cpu")  # type: ignore[arg-type]


def test_layers_share_the_streams_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream has memory of its own: with streams of their own, layers could not use each other's."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: object())
    # No such devices: what is remembered is not found again.
    first, second, other = (offload._streams_of(torch.device("cuda", number)) for number in (98, 98, 99))
    assert first is second is not other


def test_a_subclass_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is not what its storage says: tensors in FP8 of Transformer Engine, for example."""

    class Holder(torch.Tensor):
        pass

    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "SMALLEST", 0)
    held = torch.ones(3).as_subclass(Holder)
    with offload.OffloadedLayer(torch.nn.Linear(2, 2)) as layer:
        assert layer.pack(held) is held
    assert layer.count == 0


class Event:
    """Tells a log when the host waits for it."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def synchronize(self) -> None:
        self._log.append(self._name)


def test_the_host_does_not_run_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward it waits for the copies of two layers before, in backward until the device has entered the layer after."""
    log: list[str] = []
    stream, place = mock.Mock(), "none"
    stream.record_event = lambda: Event(log, f"in {place}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(offload, "_COPIED", deque(maxlen=2))
    monkeypatch.setattr(offload, "_ENTERED", deque(maxlen=1))
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "SMALLEST", 0)
    real, fetched = offload._Kept.__init__, offload._Kept.fetch

    def copied(kept: offload._Kept, tensor: torch.Tensor, streams: object) -> None:
        real(kept, tensor, None)
        kept.copied, kept.name = Event(log, f"copies of {place}"), place  # type: ignore[assignment, attr-defined]

    def fetch(kept: offload._Kept) -> None:
        log.append(f"fetch {kept.name}")  # type: ignore[attr-defined]
        fetched(kept)

    monkeypatch.setattr(offload._Kept, "__init__", copied)
    monkeypatch.setattr(offload._Kept, "fetch", fetch)
    packed, before = [], None
    for place in ("0", "1", "2", "3"):
        with offload.OffloadedLayer(torch.nn.Linear(1, 1), before) as before:
            packed.append(before.pack(torch.ones(3)))
    assert log == ["copies of 0", "copies of 1"]
    log.clear()
    for place in ("3", "2", "1", "0"):
        offload.unpack(packed[int(place)])
    assert log == ["fetch 3", "fetch 2", "in 3", "fetch 1", "in 2", "fetch 0", "in 1"]
    log.clear()
    for place in ("next", "next but one"):  # another micro-batch: a chain of its own, such as a stage of one layer has
        with offload.OffloadedLayer(torch.nn.Linear(1, 1)) as layer:
            packed.append(layer.pack(torch.ones(3)))
        offload.unpack(packed[-1])
    assert log == ["copies of 2", "in 0", "fetch next", "copies of 3", "in next", "fetch next but one"]


def test_a_weight_that_is_gathered_while_the_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays: FSDP2 gathers the experts' weights when the layer has begun, and registers them in the place of the pieces."""
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "SMALLEST", 0)
    linear = torch.nn.Linear(2, 2)
    with offload.OffloadedLayer(linear) as layer:
        layer.pack(torch.ones(3))
        linear.weight = torch.nn.Parameter(torch.ones(2, 2))
        assert layer.pack(linear.weight) is linear.weight
    assert layer.count == 1
