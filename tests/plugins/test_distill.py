"""Distillation against a reference written from the paper, and what the teacher must not do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import (
    EXACT,
    LR,
    Plain,
    apart,
    bert,
    check_accumulation,
    check_loss_scale,
    check_padding,
    gradients,
    key,
    kl,
    match,
)
from torch import Tensor

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import ModelError
from hybridengine.plugin import Run, Split, StackView
from hybridengine.seams import Batch, Row, mix
from hybridengine.seams.trace import cost_of
from hybridengine.stack import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_checkpoint, tiny_gpt2, tiny_llama
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adversarial.freelb import FreeLB
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.prompts.prefix_tuning import PrefixTuning
from hybridengine_plugins.prompts.prompt_tuning import PromptTuning
from hybridengine_plugins.regularize.distill import Distill
from hybridengine_plugins.regularize.label_smoothing import LabelSmoothing
from hybridengine_plugins.regularize.multi_sample_dropout import MultiSampleDropout
from hybridengine_plugins.regularize.rdrop import RDrop


def teacher(**config: Any) -> Any:
    return bert(0.5, seed=7, hidden_size=16, **config).train()  # dropout, so that forgetting eval mode would show


def taught_by(model: Any = None) -> Any:
    def prepare(run: Run) -> None:
        run.load_model = lambda name: teacher() if model is None else model

    return prepare


def reference(alpha: float, temperature: float) -> Any:
    """Hinton et al., section 2: soft targets at temperature T, their gradient scaled by T squared."""
    fixed = Plain(teacher())
    fixed.model.eval()

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        student = plain.logits(batch, seed)
        with torch.no_grad():
            soft = fixed.logits(batch, 0)
        ce = torch.nn.functional.cross_entropy(student, batch.targets)
        return plain.gradient((1 - alpha) * ce + alpha * temperature**2 * kl(soft / temperature, student / temperature))

    return gradient


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.9, 4.0), (1.0, 1.0)])
def test_matches_the_paper(alpha: float, temperature: float) -> None:
    method = Distill("teacher", alpha=alpha, temperature=temperature)
    match(method, reference(alpha, temperature), prepare=taught_by())


def test_alpha_zero_is_plain_training() -> None:
    batch = make_batch()
    distilled = gradients(lambda: [Distill("teacher", alpha=0.0)], [batch], bert(), prepare=taught_by())
    assert apart(distilled, gradients(list, [batch], bert())) < EXACT


def test_a_copy_of_the_student_teaches_nothing() -> None:
    batch = make_batch()
    bench = set_up([Distill("teacher")], bert(0.0), batch, prepare=taught_by(bert(0.0)))
    bench.step([batch])
    assert bench.effect("distill", "kl") == 0


def test_the_teacher_stays_as_it_is() -> None:
    batch = make_batch()
    bench = set_up([Distill("teacher")], bert(), batch, lr=0.2, prepare=taught_by())
    before = {k: p.clone() for k, p in bench.run.modules["teacher"].state_dict().items()}
    for _ in range(2):
        bench.step([batch])
    module = bench.run.modules["teacher"]
    assert not module.training
    assert all(torch.equal(p, before[k]) for k, p in module.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert not any(name.startswith("teacher/") for name in bench.run.may_optimise)
    assert bench.effect("distill", "kl") > 0


def test_the_teacher_runs_once_per_batch_and_sees_clean_inputs() -> None:
    batch, seen = make_batch(), []
    model = teacher()
    model.classifier.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    bench = set_up([Distill("teacher"), FreeLB(steps=3), SAM()], bert(), batch, prepare=taught_by(model))
    seen.clear()
    bench.step([batch])
    assert bench.ctx.trace.text() == "F4 f4 b F4 b F4 B W F4 b F4 b F4 B S"
    with torch.no_grad():
        assert torch.equal(seen[0], model(**batch.inputs).logits)
    bench.step([make_batch(seed=1)])
    assert len(seen) == 3  # ours, and one for each step


def test_unlabelled_rows_are_learned_from(alpha: float = 0.7, temperature: float = 2.0) -> None:
    """The same divergence, averaged over all rows; cross-entropy over the labelled ones."""
    fixed = Plain(teacher())
    fixed.model.eval()

    def with_part(seed: int) -> Batch:
        part = make_batch(6, seed=seed + 50, first_row=100)
        whole = make_batch(seed=seed, parts={"unlabelled": part})
        return replace(whole, counts={**whole.counts, "all_rows": 10})

    bench = set_up([Distill("teacher", alpha, temperature)], bert(), with_part(0), lr=LR, prepare=taught_by())
    plain = Plain(bert())
    for step in range(3):
        batch = with_part(step)
        bench.step([batch])
        student = plain.logits(batch, key(step))
        other = plain.logits(batch.parts["unlabelled"], mix(key(step), "unlabelled"))
        with torch.no_grad():
            soft = fixed.logits(batch, 0), fixed.logits(batch.parts["unlabelled"], 0)
        pairs = zip(soft, (student, other), strict=True)
        total = sum(len(p) * kl(p / temperature, q / temperature) for p, q in pairs)
        ce = torch.nn.functional.cross_entropy(student, batch.targets)
        plain.descend(plain.gradient((1 - alpha) * ce + alpha * temperature**2 * total / 10))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step
    assert bench.ctx.trace.text() == "F4 f4 F6 f6 B S"


def test_a_finished_run_is_asked_once_for_each_row() -> None:
    """Where it writes rows in its own way, it answers for rows, not for this run's inputs."""
    asked: list[str] = []
    told = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]]).double().log()

    def answer(rows: Sequence[Row]) -> Tensor:
        asked.extend(row["text"] for row in rows)
        return told[[int(row["text"]) for row in rows]]

    def prepare(run: Run) -> None:
        run.splits = {"train": Split("train", [{"text": str(i)} for i in range(4)])}
        run.load_answers = lambda name: answer

    batch = make_batch()
    with torch.no_grad():
        expected = 4 * kl(told / 2, Plain(bert(0.0)).logits(batch, 0) / 2)
    for others in ([], [SAM(), FreeLB()]):
        asked.clear()
        bench = set_up([Distill("run", alpha=1.0), *others], bert(0.0), batch, prepare=prepare)
        terms = [bench.step([batch]), bench.step([batch])]
        assert asked == ["0", "1", "2", "3"] and "teacher" not in bench.run.modules
        if not others:
            torch.testing.assert_close(terms[1]["distill"], expected, rtol=EXACT, atol=EXACT)


def test_cost() -> None:
    bench = set_up([Distill("teacher")], bert(), make_batch(), prepare=taught_by())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 f4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 4


def test_a_teacher_of_other_classes_is_refused() -> None:
    other = tiny_bert(num_labels=5).double()
    bench = set_up([Distill("wide")], bert(), make_batch(), prepare=taught_by(other))
    with pytest.raises(ModelError, match=r"teacher wide gives scores of shape \(4, 5\), the student \(4, 3\)"):
        bench.step([make_batch()])


def test_invariants() -> None:
    for check in (check_accumulation, check_padding, check_loss_scale):
        check(lambda: [Distill("teacher")], prepare=taught_by())


# ---- hidden states and attention -------------------------------------------------------------------------------------


def tall(heads: int = 4) -> Any:
    """A teacher twice as deep and half as wide as the student."""
    return teacher(num_hidden_layers=4, num_attention_heads=heads, intermediate_size=16)


def rows_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over each row's real tokens, then over rows."""
    return torch.stack([row[real == 1].mean() for row, real in zip(values, mask, strict=True)]).mean()


def looking(model: Any, batch: Batch, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(**batch.inputs, output_hidden_states=True, output_attentions=True)


def inner_reference(hidden: float, attention: float, heads: int) -> Any:
    """TinyBERT, equations 7 to 9, with maps after the softmax; layers 0, 2, 4 of the teacher are for 0, 1, 2."""
    fixed = tall(heads).eval()
    fixed.set_attn_implementation("eager")

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        with torch.no_grad():
            soft = looking(fixed, batch, 0)
        student, mask = looking(plain.model, batch, seed), batch.inputs["attention_mask"]
        total = 0.5 * torch.nn.functional.cross_entropy(student.logits, batch.targets)
        total = total + 0.5 * 4 * kl(soft.logits / 2, student.logits / 2)
        for i, j in ((0, 0), (1, 2), (2, 4)):
            difference = student.hidden_states[i] @ plain.parameters["distill/weight"].T - soft.hidden_states[j]
            total = total + hidden / 3 * rows_mean((difference**2).mean(-1), mask)
        for i, j in ((0, 1), (1, 3)):
            mine, theirs = student.attentions[i], soft.attentions[j]
            if mine.shape != theirs.shape:
                mine, theirs = mine.mean(1, True), theirs.mean(1, True)
            total = total + attention / 2 * rows_mean(((mine - theirs) ** 2).sum(-1).mean(1), mask)
        return plain.gradient(total)

    return gradient


@pytest.mark.parametrize(("hidden", "attention", "heads"), [(1.0, 0.0, 4), (0.5, 2.0, 4), (0.5, 2.0, 2)])
def test_inner_states_match_the_paper(hidden: float, attention: float, heads: int) -> None:
    method = Distill("teacher", hidden=hidden, attention=attention)
    bench = set_up([method], bert(), make_batch(), lr=LR, prepare=taught_by(tall(heads)))
    plain, gradient = Plain(bert()), inner_reference(hidden, attention, heads)
    plain.model.set_attn_implementation("eager")
    torch.manual_seed(0)
    plain.parameters["distill/weight"] = torch.nn.Linear(32, 16, bias=False).double().weight
    for step in range(3):
        batch = make_batch(seed=step)
        bench.step([batch])
        plain.descend(gradient(plain, batch, key(step)))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT
    assert bench.effect("distill", "hidden") > 0
    assert attention == 0 or bench.effect("distill", "attention") > 0


def test_a_copy_of_the_student_has_the_same_insides() -> None:
    batch = make_batch()
    bench = set_up([Distill("t", hidden=1.0, attention=1.0)], bert(0.0), batch, prepare=taught_by(bert(0.0)))
    bench.step([batch])
    assert bench.effect("distill", "hidden") < EXACT and bench.effect("distill", "attention") < EXACT
    assert not any("/" in name for name in bench.run.may_optimise)  # of equal width: no projection


def test_inner_invariants_and_cost() -> None:
    """With unlabelled rows in two of the checks, whose states are compared too."""

    def stack() -> list[Any]:
        return [Distill("teacher", hidden=1.0, attention=1.0)]

    for check in (check_accumulation, check_padding, check_loss_scale):
        check(stack, prepare=lambda run: taught_by(tall())(run))
    bench = set_up(stack(), bert(), make_batch(), prepare=taught_by(tall()))
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 f4 B S" and bench.ctx.trace.features


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_decoders_teach_decoders(make: Any) -> None:
    options = {"num_labels": 3, "pad_token_id": 0}
    student, other = (make("AutoModelForSequenceClassification", seed=s, **options).double() for s in (0, 1))
    bench = set_up([Distill("t", hidden=1.0, attention=1.0)], student, make_batch(), prepare=taught_by(other.eval()))
    bench.step([make_batch()])
    assert bench.effect("distill", "hidden") > 0 and bench.effect("distill", "attention") > 0


def test_stacked_around_other_losses_it_still_sees_inside() -> None:
    stack = [LabelSmoothing(), Distill("t", hidden=1.0), MultiSampleDropout(), RDrop()]
    bench = set_up(stack, bert(), make_batch(), prepare=taught_by(tall()))
    bench.step([make_batch()])
    assert bench.effect("distill", "hidden") > 0 and bench.ctx.trace.text() == "F8 f8 B S"


def test_layers_that_cannot_be_compared_are_refused() -> None:
    facts = {"model": SimpleNamespace(is_encoder_decoder=True)}
    (problem,) = Distill("t", hidden=1.0).check_stack(StackView((), facts))
    assert "two stacks of layers; set `hidden` and `attention` to 0" in problem
    assert Distill("t").check_stack(StackView((), facts)) == []
    beside = StackView((as_method(PromptTuning()),), {"model": SimpleNamespace()})
    assert "states beside prompt-tuning cannot be compared" in Distill("t", attention=1.0).check_stack(beside)[0]
    assert Distill("ema", attention=1.0).check_stack(beside) == []
    prefixed = StackView((as_method(PrefixTuning()),), {"model": SimpleNamespace()})
    assert "states beside prefix-tuning" in Distill("ema", attention=1.0).check_stack(prefixed)[0]
    assert Distill("ema", hidden=1.0).check_stack(prefixed) == []

    def prepare(run: Run) -> None:
        run.load_answers = lambda name: lambda rows: torch.zeros(len(rows), 3)

    with pytest.raises(ModelError, match=r"gives answers alone; set `hidden` and `attention` to 0"):
        set_up([Distill("run", hidden=1.0)], bert(), make_batch(), prepare=prepare)


# ---- the student's own average ---------------------------------------------------------------------------------------


def test_the_average_of_the_student_teaches() -> None:
    """Tarvainen, Valpola 2017: the teacher's weights follow the student's after each step."""
    bench = set_up([Distill("ema", decay=0.15)], bert(), make_batch(), lr=LR)
    plain, mean = Plain(bert()), bert().eval()
    for step in range(3):
        batch = make_batch(seed=step)
        bench.step([batch])
        with torch.no_grad():
            soft = mean(**batch.inputs).logits
        student = plain.logits(batch, key(step))
        ce = torch.nn.functional.cross_entropy(student, batch.targets)
        plain.descend(plain.gradient(0.5 * ce + 0.5 * 4 * kl(soft / 2, student / 2)))
        with torch.no_grad():
            rate = min(0.15, (1 + step) / (10 + step))
            for name, value in mean.named_parameters():
                value.copy_(rate * value + (1 - rate) * plain.parameters[name])
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT
    assert "teacher" not in bench.run.modules and bench.run.model.training
    assert apart(bench.run.state("distill"), {k: p.detach() for k, p in mean.named_parameters()}) < EXACT


def test_the_average_has_the_cost_of_a_teacher_and_keeps_to_what_is_trained() -> None:
    bench = set_up([LoRA(r=2), Distill("ema", hidden=1.0)], bert(), make_batch(), lr=LR)
    for step in range(2):
        bench.step([make_batch(seed=step)])
    assert bench.ctx.trace.text() == "F4 f4 B S"
    assert bench.run.state("distill").keys() == bench.run.may_optimise.keys()
    assert bench.effect("distill", "hidden") > 0


def test_the_average_teaches_under_checkpointing() -> None:
    """Its passes are made in evaluation mode, where nothing is computed again."""
    found = []
    for checkpointing in (False, True):
        model = bert()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        found.append(gradients(lambda: [Distill("ema")], [make_batch()], model))
    assert apart(*found) < EXACT


def test_a_finished_run_predicts_without_what_only_training_needs(tmp_path: Path) -> None:
    """The teacher is another run; the projection to its width stands beside `best/` and is not asked for."""
    rows = [{"text": f"{word} movie {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    config: dict[str, Any] = {
        "task": "text-classification",
        "model": {"name": str(tiny_checkpoint(tmp_path / "teacher", hidden_size=16))},
        "data": {"train": rows, "validation": rows[:8], "carve": {}},
        "train": {"max_steps": 2, "batch_size": 4, "precision": "fp32"},
        "output": str(tmp_path / "first"),
    }
    Engine(config).train()
    method = {"distill": {"teacher": str(tmp_path / "first"), "hidden": 1.0, "attention": 1.0}}
    student = {"name": str(tiny_checkpoint(tmp_path / "student"))}
    engine = Engine({**config, "model": student, "methods": [method], "output": str(tmp_path / "second")})
    engine.train()
    assert engine._run.module("distill").weight.shape == (16, 32)
    assert (tmp_path / "second/best/run_modules.safetensors").is_file()
    predictor = hybridengine.load(tmp_path / "second")
    assert len(predictor.predict(["good movie 3"])) == 1 and not predictor.run.modules
