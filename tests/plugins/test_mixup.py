"""Mixup against two embeddings mixed by hand, with the engine's own draws; padding, positions, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_loss_scale, check_padding, gradients, match, rows_of
from torch import Tensor
from torch.nn import functional

from hybridengine.engine import Engine
from hybridengine.errors import StackError
from hybridengine.seams import Batch, Context, KeyedRows, Out, View, mix
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_checkpoint, tiny_gpt2, tiny_llama
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.regularize.class_weights import ClassWeights
from hybridengine_plugins.regularize.label_smoothing import LabelSmoothing
from hybridengine_plugins.regularize.mixup import Mixup, _mixture, _partners
from hybridengine_plugins.regularize.rdrop import RDrop
from hybridengine_plugins.tasks.text_classification import TextClassification
from hybridengine_plugins.tasks.token_classification import TokenClassification


def pairs(batch: Batch, step: int, alpha: float) -> list[tuple[int, float]]:
    """Each row's partner and its own share of the mixture."""
    key = (0, "mixup", step)
    draws = KeyedRows(key, batch.rows).uniform(1)[:, 0]
    order = draws.argsort().tolist()
    after = {row: order[(place + 1) % len(order)] for place, row in enumerate(order)}
    shares = [random.Random(mix(*key, row)).betavariate(alpha, alpha) for row in batch.rows]
    return [(after[i], max(share, 1 - share)) for i, share in enumerate(shares)]


def reference(alpha: float) -> Any:
    steps = iter(range(10))

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        mask, table = batch.inputs["attention_mask"], plain.embedding.weight
        rows, union, chosen = [], mask.clone(), pairs(batch, next(steps), alpha)
        for i, (j, share) in enumerate(chosen):
            words = [table[batch.inputs["input_ids"][k]] * mask[k][:, None] for k in (i, j)]
            rows.append(share * words[0] + (1 - share) * words[1])
            union[i] = mask[i] | mask[j]
        handle = plain.embedding.register_forward_hook(lambda m, a, out: torch.stack(rows))
        logits = plain.logits(replace(batch, inputs={**batch.inputs, "attention_mask": union}), seed)
        handle.remove()
        loss: Any = 0.0
        for i, (j, share) in enumerate(chosen):
            one, other = (functional.cross_entropy(logits[i], batch.targets[k]) for k in (i, j))
            loss = loss + share * one + (1 - share) * other
        return plain.gradient(loss / batch.size)

    return gradient


@pytest.mark.parametrize("alpha", [0.4, 16.0])
def test_three_steps_match_the_paper(alpha: float) -> None:
    match(Mixup(alpha=alpha), reference(alpha))


def test_a_tiny_alpha_is_plain_training() -> None:
    """Beta(1e-6, 1e-6) is 0 or 1 to the last bit; only rows of one length keep theirs."""
    batch = make_batch(padded=False)
    silent = gradients(lambda: [Mixup(alpha=1e-6)], [batch], bert())
    assert apart(silent, gradients(list, [batch], bert())) < EXACT


def test_a_row_alone_is_plain_training() -> None:
    batch = rows_of(make_batch(), 0, 1)
    assert apart(gradients(lambda: [Mixup()], [batch], bert()), gradients(list, [batch], bert())) < EXACT


def test_padding_and_loss_scale() -> None:
    check_padding(lambda: [Mixup()])
    check_loss_scale(lambda: [Mixup()])


def test_the_order_of_rows_does_not_matter_and_other_rows_do() -> None:
    batch = make_batch(8, 9)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    shuffled = replace(
        batch,
        inputs={k: x[order] for k, x in batch.inputs.items()},
        targets=batch.targets[order],
        rows=tuple(batch.rows[i] for i in order),
        masks={kind: {k: x[order] for k, x in of.items()} for kind, of in batch.masks.items()},
    )
    one = gradients(lambda: [Mixup()], [batch], bert(0.0))
    assert apart(gradients(lambda: [Mixup()], [shuffled], bert(0.0)), one) < EXACT
    halves = [rows_of(batch, 0, 4), rows_of(batch, 4, 8)]
    assert apart(gradients(lambda: [Mixup()], halves, bert(0.0)), one) > 1e-3  # partners come from one micro-batch


def test_no_row_is_its_own_partner_and_copies_agree() -> None:
    rows = (5, 9, 2, 7)
    draws = KeyedRows((0,), rows).uniform(1)[:, 0].tolist()
    once = _partners(rows, draws)
    assert sorted(once) == [0, 1, 2, 3] and all(i != j for i, j in enumerate(once))
    assert _partners(rows * 2, draws * 2) == [*once, *(j + 4 for j in once)]
    assert _partners((5, 9, 5), [0.3, 0.6, 0.3]) == [1, 0, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixture_reads_like_the_longer_text(side: str) -> None:
    """Ids, token types and positions where only the partner has tokens are the partner's."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.tensor([[3, 4, 5, 6], [13, 14, 15, 16]]) * mask
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids, "position_ids": mask.cumsum(1) - mask}
    batch = Batch(inputs, torch.tensor([0, 2]), (0, 1), {"attention": {"input_ids": mask}})
    made = _mixture(batch, torch.tensor([1, 0]), torch.tensor([0.75, 0.5]), 3)
    first = [3, 4, 15, 16] if side == "right" else [13, 14, 5, 6]
    assert made.inputs["input_ids"].tolist() == [first, [13, 14, 15, 16]]
    assert made.inputs["token_type_ids"][0].tolist() == first
    assert made.inputs["position_ids"].tolist() == [[0, 1, 2, 3]] * 2 and made.inputs["attention_mask"].all()
    assert made.masks["attention"]["input_ids"].all()
    assert made.targets.tolist() == [[0.75, 0, 0.25], [0.5, 0, 0.5]]


class Keeping(SimpleTask):
    """A task that keeps the logits of its last evaluation."""

    logits: Tensor

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        out = super().loss(ctx, batch, view)
        self.logits = out.scores.detach()
        return out


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_a_decoder_classifies_the_last_token_of_the_longer_text(make: Any) -> None:
    """Its logits are those of the mixture by itself, without any padding."""
    model = make("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0).double()
    batch, task = make_batch(), Keeping()
    bench = set_up([Mixup()], model, batch, task=task)
    bench.step([batch])
    (x,) = bench.ctx.embedded(batch, View()).values()
    words, mask = x.detach() * batch.inputs["attention_mask"][..., None], batch.inputs["attention_mask"]
    for i, (j, share) in enumerate(pairs(batch, 0, 0.4)):
        length = int(mask[[i, j]].sum(1).max())
        mixed = (share * words[i] + (1 - share) * words[j])[None, :length]
        handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out, mixed=mixed: mixed)
        alone = model(input_ids=torch.full((1, length), 5)).logits[0]
        handle.remove()
        assert torch.allclose(task.logits[i], alone, rtol=0, atol=1e-10)


def test_targets_of_several_labels_mix() -> None:
    batch = replace(make_batch(), targets=torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]]))
    bench = set_up([Mixup()], bert(), batch, task=TextClassification(multi_label=True))
    bench.step([batch])
    assert bench.effect("mixup", "mixed") > 0


@pytest.mark.parametrize("leaf", [ClassWeights(weights={"a": 2.0}), LabelSmoothing(smoothing=0.2)], ids=str)
def test_losses_of_the_leaf_are_linear_in_the_target(leaf: Any) -> None:
    batch = make_batch()
    bench = set_up([leaf], bert(), batch, task=TextClassification())
    one, other = batch.targets, batch.targets.roll(1)
    soft = 0.75 * functional.one_hot(one, 3).double() + 0.25 * functional.one_hot(other, 3).double()
    first, second, both = (
        bench.ctx.loss(bench.ctx, replace(batch, targets=t), View(key=1)).terms["loss"][0] for t in (one, other, soft)
    )
    assert (0.75 * first + 0.25 * second - both).abs() < EXACT


def test_attacks_and_other_losses_see_mixtures() -> None:
    batch = make_batch(8)
    bench = set_up([Mixup(), RDrop(), FGM(epsilon=0.5)], bert(), batch)
    bench.step([batch])
    assert bench.effect("fgm", "delta_norm") > 0 and bench.effect("rdrop", "kl") > 0
    still = set_up([Mixup(), RDrop()], bert(0.0), batch)
    still.step([batch])
    assert still.effect("rdrop", "kl") < EXACT  # both views are of the same mixture


def test_refusals(tmp_path: Path) -> None:
    run = set_up([], bert(), make_batch()).run
    run.task = TokenClassification()
    with pytest.raises(StackError, match=r"mixes the labels of rows.*remove mixup"):
        Mixup().transform_data(run, {})
    rows = [{"text": f"{word} movie", "label": word} for word in ("good", "bad")] * 4
    config: dict[str, Any] = {
        "task": "text-classification",
        "model": {"name": str(tiny_checkpoint(tmp_path / "model"))},
        "data": {"train": rows, "validation": rows[:4], "carve": {}},
        "train": {"batch_size": 1},
        "methods": ["mixup", "focal"],
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(StackError) as told:
        Engine(config).validate()
    assert "set train.batch_size to 2" in str(told.value) and "needs the one label of each row" in str(told.value)
