"""Mixout against a forward through weights mixed by hand, and what its masks must have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, key
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from hybridengine.errors import StackError
from hybridengine.plugin import StackView
from hybridengine.seams import Batch, Context, Out, View, mix
from hybridengine.seams.trace import cost_of
from hybridengine.stack import as_method
from hybridengine.testing import SimpleTask, make_batch, set_up
from hybridengine_plugins.adapters.full import Full
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.prompts.prefix_tuning import PrefixTuning
from hybridengine_plugins.prompts.prompt_tuning import PromptTuning
from hybridengine_plugins.regularize.mixout import Mixout
from hybridengine_plugins.regularize.rdrop import RDrop
from hybridengine_plugins.tasks.text_classification import TextClassification


def is_mixed(name: str) -> bool:
    return not name.startswith("classifier") and "_embeddings." not in name


def mixed_weights(plain: Plain, start: dict[str, Tensor], p: float, seed: int) -> dict[str, Tensor]:
    """Lee et al., equation 2: the pretrained weight with probability p, else what keeps the expectation."""
    found = {}
    for name, w in plain.parameters.items():
        if is_mixed(name):
            g = torch.Generator().manual_seed(mix(seed, "mixout", name))
            m = torch.empty(w.shape, dtype=torch.bool).bernoulli_(p, generator=g).double()
            found[name] = (m * start[name] + (1 - m) * w - p * start[name]) / (1 - p)
    return found


def reference(plain: Plain, start: dict[str, Tensor], p: float, batch: Batch, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixed = mixed_weights(plain, start, p, seed)
        logits = functional_call(plain.model, mixed, (), dict(batch.inputs)).logits
    return plain.gradient(functional.cross_entropy(logits, batch.targets))


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_three_steps_match_the_paper(p: float) -> None:
    batches = [make_batch(seed=s) for s in range(3)]
    bench, plain = set_up([Mixout(p=p)], bert(), batches[0], lr=LR * (1 - p)), Plain(bert())
    start = {k: x.detach().clone() for k, x in plain.parameters.items()}
    for step, batch in enumerate(batches):
        bench.step([batch])
        plain.descend(reference(plain, start, p, batch, key(step)), LR * (1 - p))
        assert apart(bench.parameters(), {k: x.detach() for k, x in plain.parameters.items()}) < EXACT
    assert apart(bench.parameters(), start) > 1e-3


def test_p_zero_is_plain_training() -> None:
    batch = make_batch()
    silent = gradients(lambda: [Mixout(p=0.0)], [batch], bert(), lr=LR)
    assert apart(silent, gradients(list, [batch], bert(), lr=LR)) < EXACT


class Watching(SimpleTask):
    """A task that keeps the weights of every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        self.seen.append({k: x.detach().clone() for k, x in (view.params or {}).items()})
        return super().loss(ctx, batch, view)


def moved_bench(*methods: object, steps: int = 1, p: float = 0.7) -> tuple[Any, Watching]:
    """A bench whose weights have left their start."""
    bench = set_up([Mixout(p=p), *methods], bert(), make_batch(), lr=LR * (1 - p), task=(task := Watching()))
    for step in range(steps):
        bench.step([make_batch(seed=step)])
    task.seen.clear()
    return bench, task


def test_each_weight_is_the_pretrained_one_or_goes_further_and_the_mean_stays() -> None:
    bench, task = moved_bench()
    start = bench.run.state("mixout")
    assert all(is_mixed(name) for name in start) and len(start) > 20
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    w, u, total = bench.run.may_optimise[name].detach(), start[name], 0.0
    for draw in range(200):
        bench.ctx.loss(bench.ctx, make_batch(), View(key=draw))
        mixed = task.seen[-1][name]
        back = mixed == u
        assert torch.allclose(mixed[~back], ((w - 0.7 * u) / 0.3)[~back], rtol=1e-12, atol=0)
        total = total + mixed / 200
    # Each is u, or u + (w - u) / 0.3 in 3 of 10 draws: the mean of 200 deviates by |w - u| sqrt(0.7 / 0.3 / 200).
    score = ((total - w) / ((w - u) * (0.7 / 0.3 / 200) ** 0.5))[w != u]
    assert len(score) > 500 and abs(score.square().mean() - 1) < 0.2 and score.abs().max() < 5.5


def test_passes_of_one_dropout_key_share_the_weights_and_micro_batches_do_not() -> None:
    bench, task = moved_bench(RDrop(), FGM(epsilon=0.5), SAM())
    name = "bert.pooler.dense.weight"
    with torch.no_grad():
        bench.run.may_optimise[name].add_(0.1)  # no weight is where it started
    bench.step([make_batch(), make_batch(seed=4, first_row=10)])
    back = [tuple((seen[name] == bench.run.state("mixout")[name]).flatten().tolist()) for seen in task.seen if seen]
    assert len(set(back)) == 2 and len(back) > 4


def test_the_start_is_that_of_the_first_step_and_evaluation_has_the_weights() -> None:
    first = {k: x.detach().clone() for k, x in bert().named_parameters()}
    bench, _ = moved_bench(steps=2)
    assert all(torch.equal(x, first[k]) for k, x in bench.run.state("mixout").items())
    with bench.evaluation():
        prediction = bench.ctx.predict(bench.ctx, make_batch(), View())
        assert torch.equal(prediction.scores, bench.run.model(**make_batch().inputs).logits.softmax(-1))


def test_it_costs_no_pass_and_tells_what_it_did() -> None:
    bench, _ = moved_bench()
    bench.step([make_batch()])
    assert cost_of(bench.ctx.trace.events, 4) == 3
    bench, _ = moved_bench(steps=11)
    assert abs(bench.effect("mixout", "replaced") - 0.7) < 0.01 and bench.effect("mixout", "shift") > 0


def test_invariants() -> None:
    check_accumulation(lambda: [Mixout(p=0.0)])  # another micro-batch has another mask, as with dropout
    check_padding(lambda: [Mixout()])
    check_loss_scale(lambda: [Mixout()])


def test_beside_lora_the_adapter_goes_back_to_its_start() -> None:
    bench = set_up([LoRA(r=2), Mixout()], bert(), make_batch(), lr=LR, task=TextClassification())
    bench.step([make_batch()])
    assert {name.rsplit(".", 3)[1] for name in bench.run.state("mixout")} == {"lora_A", "lora_B"}


def test_a_frozen_backbone_is_refused() -> None:
    model = bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    bench = set_up([Mixout()], model, make_batch())
    with pytest.raises(StackError, match=r"no pretrained weight is trained.*remove mixout or what freezes"):
        bench.step([make_batch()])


def test_beside_soft_prompts_the_model_must_be_trained_as_well() -> None:
    def problems(*methods: object) -> list[str]:
        return Mixout().check_stack(StackView([as_method(method) for method in methods], {}))

    (problem,) = problems(Mixout(), PromptTuning())
    assert problem.startswith("mixout: beside prompt-tuning no pretrained weight is trained; add `full`")
    assert len(problems(PrefixTuning())) == 1
    assert problems(Mixout(), PromptTuning(), Full()) == problems(Mixout()) == problems(LoRA()) == []
