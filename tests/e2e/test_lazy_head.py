"""A language model's logits are made in training only where a method reads them; nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridengine import kernels
from hybridengine.engine import Engine
from hybridengine.seams import View
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert, tiny_checkpoint, tiny_llama
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.pgd import PGD
from hybridengine_plugins.regularize.label_smoothing import LabelSmoothing
from hybridengine_plugins.regularize.rdrop import RDrop

STACKS: dict[str, Any] = {
    "plain": list,
    "fgm": lambda: [FGM(epsilon=0.5)],
    "pgd": lambda: [PGD(epsilon=0.5, steps=2)],
    "label-smoothing": lambda: [LabelSmoothing(0.1)],
    "rdrop": lambda: [RDrop()],
}


def gradients(stack: Any, lazy: bool, family: str) -> dict[str, torch.Tensor]:
    make, kind = {"bert": (tiny_bert, "AutoModelForMaskedLM"), "llama": (tiny_llama, "AutoModelForCausalLM")}[family]
    model = make(kind).double().train()
    batch = make_batch(6, 9, kind="tokens")
    bench = set_up(stack(), model, batch, task=SimpleTask("tokens"))
    if lazy:
        bench.run.lazy_head = model.get_output_embeddings()
    return bench.gradients([batch])


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", STACKS)
def test_gradients_are_what_they_were(name: str, family: str) -> None:
    lazy, whole = (gradients(STACKS[name], lazy, family) for lazy in (True, False))
    assert lazy.keys() == whole.keys()
    for parameter, expected in whole.items():
        torch.testing.assert_close(lazy[parameter], expected, rtol=1e-9, atol=1e-12)


def test_only_training_passes_are_lazy() -> None:
    model = tiny_llama("AutoModelForCausalLM")
    bench = set_up([], model, make_batch(kind="tokens"), task=SimpleTask("tokens"))
    bench.run.lazy_head = model.get_output_embeddings()
    for training in (True, False):
        model.train(training)
        for view in (View(), View(params=dict(model.named_parameters()))):
            (out,) = bench.ctx.outputs(make_batch(kind="tokens"), [view])
            assert isinstance(out.logits, kernels.LazyLogits) == training


def engine(folder: Path, task: str, *methods: Any, **train: Any) -> Engine:
    kinds = {
        "language-modeling": ("llama", "AutoModelForCausalLM"),
        "masked-language-modeling": ("bert", "AutoModelForMaskedLM"),
    }
    architecture, auto_class = kinds[task]
    model = tiny_checkpoint(folder / "model", architecture=architecture, auto_class=auto_class)
    rows = [{"text": f"a good movie about the number {i}"} for i in range(16)]
    config = {
        "task": task,
        "model": {"name": str(model)},
        "data": {"train": rows, "validation": rows[:4]},
        "train": {"max_steps": 3, "batch_size": 4, "precision": "fp32", **train},
        "methods": list(methods),
        "output": str(folder / "run"),
    }
    return Engine(config)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("task", ["language-modeling", "masked-language-modeling"])
def test_the_engine_makes_no_logits_where_no_method_reads_them(task: str, tmp_path: Path) -> None:
    plain = engine(tmp_path / "a", task, {"fgm": {"epsilon": 0.5}})
    plain.adapt()
    assert not plain.plan().logits and plain._run.lazy_head is plain._run.model.get_output_embeddings()
    reading = engine(tmp_path / "b", task, {"lora": {"r": 2, "dropout": 0.1}}, "rdrop")
    reading.adapt()
    assert reading.plan().logits and reading._run.lazy_head is None
    compiled = engine(tmp_path / "c", task, compile=True)
    compiled.adapt()
    assert compiled._run.lazy_head is None
    low_rank = engine(tmp_path / "d", task, {"lora": {"r": 2}})
    low_rank.adapt()
    assert low_rank._run.lazy_head is not None


@pytest.mark.parametrize("task", ["language-modeling", "masked-language-modeling"])
def test_a_run_learns_the_same(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path / "lazy", task).train()
    summary = json.loads((tmp_path / "lazy" / "run" / "summary.json").read_text(encoding="utf-8"))
    assert "linear_cross_entropy" in summary["kernels"]
    monkeypatch.setattr(kernels, "why_not_patched", lambda head: "switched off by the test")
    engine(tmp_path / "whole", task).train()
    # Float32 sums in another order, through three steps of AdamW.
    assert losses(tmp_path / "lazy") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
