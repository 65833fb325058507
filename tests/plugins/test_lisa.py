"""LISA: an AdamW by hand over the layers whose turn it is, the draw, resume, optimizer state, refusals."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, check_restores, key

from hybridengine.errors import ModelError
from hybridengine.seams import permutation
from hybridengine.stack import check_stack
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_t5
from hybridengine_plugins.adapters.gradual_unfreeze import GradualUnfreeze
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adapters.lp_ft import LPFT
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.optim.lisa import LISA
from hybridengine_plugins.optim.schedule_free import ScheduleFree

BATCH = make_batch()
LAYERS, LR, DECAY = 4, 0.01, 0.1


def bench_of(start=0, dropout=0.1, methods=(), adam=True, **parameters):
    model = bert(dropout, num_hidden_layers=LAYERS)
    bench = set_up([LISA(**{"layers": 2, "every": 2, **parameters}), *methods], model, BATCH, lr=LR)
    if adam:
        bench.run.optimizer = torch.optim.AdamW(bench.run.may_optimise.values(), lr=LR, weight_decay=DECAY)
    bench.run.step = start
    return bench


def layer_of(name):
    return int(name.split("layer.")[1].split(".")[0]) if "layer." in name else None


def turn_of(step, every=2, layers=2, seed=0):
    """The layers that train at a step, counted from 0."""
    return set(permutation(LAYERS, seed, "lisa", step // every)[:layers])


class Adam:
    """AdamW from its paper, one tensor at a time, with moments that can be forgotten."""

    def __init__(self):
        self.moments = {}

    def move(self, name, p, g):
        m, v, t = self.moments.get(name, (0.0, 0.0, 0))
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
        self.moments[name] = (m, v, t)
        p.mul_(1 - LR * DECAY).sub_(LR * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))

    def forget(self, name):
        self.moments.pop(name, None)


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_eight_steps_match_the_paper(state):
    bench = bench_of(state=state)
    plain, adam = Plain(bert(0.1, num_hidden_layers=LAYERS)), Adam()
    returned = set()
    for step in range(8):
        batch = make_batch(seed=step)
        before = bench.parameters()
        bench.step([batch])
        gradient = plain.gradient(plain.loss(batch, key(step)))
        with torch.no_grad():
            for name, p in plain.parameters.items():
                if layer_of(name) in {None, *turn_of(step)}:
                    returned |= {layer_of(name)} if adam.moments.get(name, (0, 0, 0))[2] > 1 else set()
                    adam.move(name, p, gradient[name])
                elif state == "drop":
                    adam.forget(name)
        for name, p in bench.parameters().items():
            assert torch.equal(p, before[name]) == (layer_of(name) not in {None, *turn_of(step)}), (step, name)
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step
    assert len(set.union(*(turn_of(s) for s in range(8)))) > 2 and returned - {None}, "no layer came back"


def test_state_and_gradients_of_resting_layers_are_dropped_and_all_is_trainable_afterwards():
    bench = bench_of(every=1)
    for step in range(6):
        bench.step([BATCH])
        for name, p in bench.run.may_optimise.items():
            trains = layer_of(name) in {None, *turn_of(step, every=1)}
            assert (p in bench.run.optimizer.state) == (p.grad is not None) == trains, (step, name)
            assert p.requires_grad
    assert bench.effect("lisa", "resting") == 2 * 16  # parameter tensors of a layer


def test_kept_state_grows_to_that_of_full_tuning():
    bench = bench_of(every=1, state="keep")
    for _ in range(8):
        bench.step([BATCH])
    assert set().union(*(turn_of(s, every=1) for s in range(8))) == set(range(LAYERS))
    assert all(p in bench.run.optimizer.state for p in bench.run.may_optimise.values())


def test_every_layer_is_drawn_alike_and_seeds_draw_otherwise():
    draws = [turn_of(step, every=1) for step in range(4000)]
    shares = Counter(layer for draw in draws for layer in draw)
    assert all(len(draw) == 2 for draw in draws)
    # A share of 1/2 over 4000 draws has a standard deviation of 0.0079.
    assert all(abs(shares[layer] / 4000 - 0.5) < 5 * 0.0079 for layer in range(LAYERS))
    assert draws != [turn_of(step, every=1, seed=1) for step in range(4000)]


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_resume_is_exact(cut):
    whole = bench_of()
    for step in range(6):
        whole.step([make_batch(seed=step)])
    first = bench_of()
    for step in range(cut):
        first.step([make_batch(seed=step)])
    second = bench_of(start=cut)
    second.run.model.load_state_dict(first.run.model.state_dict())
    second.run.optimizer.load_state_dict(first.run.optimizer.state_dict())
    for step in range(cut, 6):
        second.step([make_batch(seed=step)])
    for name, value in whole.parameters().items():
        assert torch.equal(value, second.parameters()[name]), name


def test_weight_perturbations_move_what_trains_in_this_step_alone():
    moved = []

    class Watched(SAM):
        name = "watched"

    bench = bench_of(methods=[Watched(rho=0.1)], adam=False, every=1)
    ascend = bench.ctx.ascend_weights

    def spy(gradient, **options):
        moved.append({layer_of(name) for name in gradient})
        return ascend(gradient, **options)

    bench.ctx.ascend_weights = spy
    for step in range(3):
        bench.step([BATCH])
        assert moved[step] == {None, *turn_of(step, every=1)}


def test_over_lora_layers_are_those_with_adapters():
    bench = set_up([LISA(layers=1, every=1), LoRA(r=2)], tiny_bert(num_labels=3), BATCH, lr=0.1)
    for _ in range(4):
        before = bench.parameters()
        bench.step([BATCH])
        changed = {layer_of(k) for k, p in bench.parameters().items() if not torch.equal(p, before[k])}
        assert None in changed and len(changed) == 2


def test_layers_of_encoder_and_decoder_are_drawn_together():
    batch = make_batch(kind="seq2seq")
    from hybridengine.testing import SimpleTask

    bench = set_up([LISA(layers=1)], tiny_t5(), batch, lr=0.1, task=SimpleTask("tokens"))
    before = bench.parameters()
    bench.step([batch])
    changed = {k for k, p in bench.parameters().items() if not torch.equal(p, before[k])}
    numbers = {(k.split(".")[0], k.split("block.")[1][0]) for k in changed if "block." in k}
    assert len({number for _, number in numbers}) == 1 and {side for side, _ in numbers} == {"encoder", "decoder"}


def test_what_every_method_keeps():
    def stack():
        return [LISA(layers=1)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=1)


def test_refusals():
    with pytest.raises(ModelError, match=r"layers is 2, but only 2 layers .* lower `layers`, or remove lisa"):
        set_up([LISA(layers=2)], tiny_bert(num_labels=3), BATCH)
    for other in (GradualUnfreeze(), LPFT()):
        (problem,) = check_stack([as_method(LISA()), as_method(other)], set())
        assert "lisa" in problem and "remove one of the two" in problem
    from hybridengine.plugin import StackView

    stack = StackView([as_method(LISA()), as_method(ScheduleFree())], {})
    (problem,) = LISA().check_stack(stack)
    assert "schedule-free" in problem and "state: keep" in problem
    assert LISA(state="keep").check_stack(stack) == []
