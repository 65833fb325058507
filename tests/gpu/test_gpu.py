"""What the engine promises of a device: the same tests on the CPU, and on a GPU with `pytest -m gpu`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accumulation import STACKS, difference, split
from tiny_runs import checkpoint_bits, run_bits, run_config, text_rows, train_stopping_after
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hybridengine
from hybridengine.engine import Engine
from hybridengine.seams import Batch, Context, Out, View, sequence_norms
from hybridengine.testing import Bench, SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.fgm import FGM

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def bench_on(
    device: str, methods: list[object], batch: Batch, model: Any = None, **options: Any
) -> tuple[Bench, Batch]:
    """A bench and its batch on a device."""
    bench = set_up(methods, model or tiny_bert(num_labels=3, hidden_dropout_prob=0.3), batch, **options)
    bench.run.device = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    bench.run.model.to(bench.run.device)
    return bench, batch.to(bench.run.device)


def streams(device: str) -> list[Tensor]:
    """The global random streams that a run on this device could touch."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]


def test_equal_keys_draw_equal_masks_and_leave_the_global_streams_alone(device: str) -> None:
    bench, batch = bench_on(device, [], make_batch())
    before = streams(device)
    with torch.no_grad():
        views = [View(key=1), View(key=1), View(key=2)]
        one, again, other = (bench.ctx.outputs(batch, [view])[0].scores for view in views)
    bench.step([batch, batch])
    assert one.device.type == device
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(before, streams(device), strict=True))


class Spy(SimpleTask):
    """Keeps the delta of every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas: list[dict[str, Tensor]] = []

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        self.deltas.append({site: delta.detach().clone() for site, delta in view.delta.items()})
        return super().loss(ctx, batch, view)


def test_fgm_moves_every_sequence_by_epsilon(device: str) -> None:
    spy = Spy()
    bench, batch = bench_on(device, [FGM(epsilon=0.25)], make_batch(), task=spy)
    bench.step([batch])
    norms = sequence_norms(spy.deltas[-1])
    assert norms.device.type == device
    torch.testing.assert_close(norms, torch.full_like(norms, 0.25))


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_eight_rows_at_once_are_four_times_two(device: str, stack: Any) -> None:
    labelled = make_batch(8, 9, kind="tokens")
    unlabelled = make_batch(8, 9, kind="tokens", seed=1, first_row=100)
    gradients = []
    for parts in (1, 4):
        model = tiny_bert("AutoModelForTokenClassification", num_labels=3).double()
        bench, _ = bench_on(device, stack(), labelled, model, task=SimpleTask("tokens"))
        gradients.append(bench.gradients([batch.to(bench.run.device) for batch in split(labelled, unlabelled, parts)]))
    assert difference(*gradients) <= 1e-6


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_trains_and_resumes_bit_for_bit(device: str, precision: str, tmp_path: Path) -> None:
    """Dropout is on; under fp16 the loss scale moves and is restored too."""
    folders = whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    configs = [
        run_config(["fgm", "rdrop"], folder, device=device, precision=precision, max_steps=8, save_every=2, keep=9)
        for folder in folders
    ]
    with sdpa_kernel(SDPBackend.MATH):  # the backward of fused attention adds up in any order on a GPU
        Engine(configs[0]).train()
        assert not train_stopping_after(configs[1], 3)
        Engine(configs[1]).train()
    assert run_bits(pieces) == run_bits(whole)
    assert all(math.isfinite(loss) for loss in losses(whole)) and len(losses(whole)) == 3
    saved = [checkpoint_bits(folder) for folder in sorted((whole / "checkpoints").glob("step-*"))]
    first, last = saved[0], saved[-1]
    assert first["parameters.safetensors"] != last["parameters.safetensors"]
    assert last["trainer.json"]["loss_scale"]["value"] >= 1
    assert (last["trainer.json"]["loss_scale"]["value"] > 1) == (precision == "fp16")


def test_a_run_predicts_where_there_is_no_gpu(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(["fgm"], tmp_path, device="auto" if device == "cuda" else device)
    Engine(config).train()
    texts = [row["text"] for row in text_rows(6)]
    here = hybridengine.load(tmp_path)
    assert here.run.device.type == device
    there_too = here.predict(texts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elsewhere = hybridengine.load(tmp_path)
    assert elsewhere.run.device.type == "cpu"
    for one, other in zip(there_too, elsewhere.predict(texts), strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-3)
