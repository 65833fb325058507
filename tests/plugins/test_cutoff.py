"""Cutoff against its formula, with the engine's own draws; what is cut, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, match
from torch import Tensor
from torch.nn import functional

from hybridengine.seams import Batch, KeyedRows, View
from hybridengine.seams.trace import cost_of
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.regularize.cutoff import Cutoff, _chosen
from hybridengine_plugins.regularize.rdrop import RDrop

KINDS = ("token", "feature", "span")


def cut_rows(kind: str, ratio: float, step: int, batch: Batch, width: int = 32) -> tuple[Tensor, Tensor]:
    """Which positions `[B, L]` and coordinates `[B, D]` go, row by row as section 3.1 of the paper tells it."""
    mask = batch.inputs["attention_mask"]
    positions, coordinates = torch.zeros(mask.shape).bool(), torch.zeros(len(mask), width).bool()
    for i, row in enumerate(batch.rows):
        rows, length = KeyedRows((0, "cutoff/input_ids", step), (row,)), int(mask[i].sum())
        if kind == "feature":
            coordinates[i, rows.uniform(width)[0].argsort()[: int(ratio * width)]] = True
            continue
        number, draws = max(1, int(ratio * length)), rows.uniform(length)[0]
        if kind == "token":
            positions[i, draws.argsort()[:number]] = True
        else:
            start = int(draws[0] * (length - number + 1))
            positions[i, start : start + number] = True
    return positions, coordinates


def js(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.softmax(-1), q.softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2


def reference(kind: str, ratio: float, alpha: float, beta: float) -> Any:
    steps = iter(range(10))

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        positions, coordinates = cut_rows(kind, ratio, next(steps), batch)
        keep = ~(positions[:, :, None] | coordinates[:, None, :])
        p = plain.logits(batch, seed)
        handle = plain.embedding.register_forward_hook(lambda m, a, out: out * keep)
        attention = batch.inputs["attention_mask"] * ~positions
        q = plain.logits(replace(batch, inputs={**batch.inputs, "attention_mask": attention}), seed)
        handle.remove()
        ce, ce_cut = (functional.cross_entropy(x, batch.targets) for x in (p, q))
        return plain.gradient((ce + alpha * ce_cut + beta * js(p, q)) / (1 + alpha))

    return gradient


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_match_the_paper(kind: Any) -> None:
    match(Cutoff(kind, ratio=0.4, alpha=0.5, beta=2.0), reference(kind, 0.4, 0.5, 2.0))


def test_without_both_weights_it_is_plain_training() -> None:
    batch = make_batch()
    silent = gradients(lambda: [Cutoff(alpha=0.0, beta=0.0)], [batch], bert())
    assert apart(silent, gradients(list, [batch], bert())) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_invariants(kind: Any) -> None:
    for check in (check_accumulation, check_padding, check_loss_scale):
        check(lambda: [Cutoff(kind, ratio=0.4)])


def test_cost_is_one_more_pass() -> None:
    bench = set_up([Cutoff()], bert(), make_batch())
    bench.step([make_batch()])
    assert cost_of(bench.ctx.trace.events, 4) == 6
    assert bench.effect("cutoff", "js") > 0


@pytest.mark.parametrize("span", [False, True])
def test_special_tokens_and_padding_on_either_side_stay(span: bool) -> None:
    """The draws of a row choose the same tokens of it, wherever they stand."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    draws = torch.rand(3, 9, generator=torch.Generator().manual_seed(2))
    chosen = _chosen(draws, mask, 0.5, span)
    assert chosen.sum(1).tolist() == [3, 1, 0] and not (chosen & ~mask).any()
    moved = _chosen(draws, mask.roll(2, 1), 0.5, span)
    assert torch.equal(chosen.roll(2, 1), moved)
    if span:
        first = int(chosen[0].to(torch.int).argmax())
        assert chosen[0, first : first + 3].all()


def test_every_span_is_equally_likely() -> None:
    mask = torch.ones(4000, 5).bool()
    draws = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    starts = _chosen(draws, mask, 0.4, True).to(torch.int).argmax(1).bincount()
    assert len(starts) == 4 and (starts - 1000).abs().max() < 110  # four standard deviations of 27


def test_what_an_attack_adds_is_cut_as_well() -> None:
    bench = set_up([Cutoff("feature", ratio=0.5)], bert(), batch := make_batch())
    view = View(key=3).plus({s: torch.randn_like(z) for s, z in bench.ctx.zeros(batch).items()})
    _, at = Cutoff("feature", ratio=0.5)._cut(bench.ctx, batch, view)
    (total,) = bench.ctx.embedded(batch, at).values()
    assert ((total.abs() < 1e-15).all(1).sum(1) == 16).all()  # numbers near 1, rounded twice
    bench = set_up([Cutoff(), RDrop(), FGM(epsilon=0.5)], bert(), batch)
    bench.step([batch])
    assert bench.effect("fgm", "delta_norm") > 0 and bench.effect("cutoff", "js") > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_decoders_train_where_their_first_token_is_cut(make: Any, kind: Any) -> None:
    model = make("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0).double()
    found = gradients(lambda: [Cutoff(kind, ratio=0.9)], [make_batch()], model)
    assert all(g.isfinite().all() for g in found.values())


def test_token_labels_and_both_inputs_of_an_encoder_decoder() -> None:
    tagger = tiny_bert("AutoModelForTokenClassification", num_labels=3).double()
    batch = make_batch(kind="tokens")
    bench = set_up([Cutoff()], tagger, batch, task=SimpleTask("tokens"))
    bench.step([batch])
    assert bench.effect("cutoff", "js") > 0
    batch = make_batch(kind="seq2seq")
    bench = set_up([Cutoff("feature")], tiny_t5().double(), batch, task=SimpleTask("tokens"))
    _, view = Cutoff("feature")._cut(bench.ctx, batch, View())
    assert len(view.delta) == 2
    bench.step([batch])
