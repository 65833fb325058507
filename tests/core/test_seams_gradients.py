"""`ctx`: gradients in and out of `.grad`, exact weight moves, and the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine.errors import NonFiniteError
from hybridengine.seams import Batch, Context, Out, View, weighted_sum
from hybridengine.testing import Bench, SimpleTask, make_batch, set_up, tiny_bert


def bench_of(**options: Any) -> Bench:
    return set_up([], tiny_bert(num_labels=3).double(), make_batch(), **options)


def loss_of(bench: Bench, view: View | None = None) -> Tensor:
    return bench.ctx.task_loss(make_batch(), view or View()).terms["loss"][0]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_grad_is_unscaled_at_least_fp32_and_touches_no_grad() -> None:
    plain, scaled = bench_of(), bench_of(loss_scale=1024.0)
    for bench in (plain, scaled):
        weights = list(bench.run.optimised().values())
        got = bench.ctx.grad(loss_of(bench), weights)
        wanted = torch.autograd.grad(loss_of(bench), weights, allow_unused=True)
        for g, w in zip(got, wanted, strict=True):
            assert (g is None) == (w is None)
            if g is not None and w is not None:
                torch.testing.assert_close(g, w)
        assert all(p.grad is None for p in weights)
    half = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = plain.ctx.grad(half.sum(), [half])
    assert gradient is not None
    assert gradient.dtype == torch.float32


def test_grad_of_a_delta_computes_no_weight_gradient() -> None:
    """Weights behind the delta would otherwise cost a third of a backward."""
    bench = bench_of()
    (site, zero), *_ = bench.ctx.zeros(make_batch()).items()
    computed: list[str] = []
    for name, parameter in bench.run.optimised().items():
        parameter.register_hook(lambda g, name=name: computed.append(name))
    bench.ctx.grad(loss_of(bench, View().plus({site: zero.requires_grad_()})), [zero])
    assert computed == []
    assert bench.ctx.trace.text() == "F4 G"
    bench.ctx.grad(loss_of(bench), list(bench.run.optimised().values()))
    assert bench.ctx.trace.text() == "F4 G F4 H"


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_accumulate_adds_take_removes_add_puts_back(scale: float) -> None:
    bench = bench_of(loss_scale=scale)
    ctx = bench.ctx
    weights = bench.run.optimised()
    used = {
        k: g for k, g in zip(weights, ctx.grad(loss_of(bench), list(weights.values())), strict=True) if g is not None
    }
    ctx.accumulate(loss_of(bench))
    ctx.accumulate(loss_of(bench))
    taken = ctx.take_grads()
    assert taken.keys() == used.keys()
    for name in used:
        torch.testing.assert_close(taken[name], 2 * used[name])
    assert all(p.grad is None for p in weights.values())
    ctx.add_grads(taken)
    assert equal(ctx.take_grads(), taken)  # a round trip keeps every bit
    ctx.add_grads(taken)
    ctx.add_grads(taken)
    again = ctx.take_grads()
    assert all(torch.equal(again[k], 2 * taken[k]) for k in taken)


def test_added_gradients_carry_the_loss_scale() -> None:
    bench = bench_of(loss_scale=8.0)
    name = "classifier.bias"
    bench.ctx.add_grads({name: torch.ones(3, dtype=torch.float64)})
    grad = bench.run.optimised()[name].grad
    assert grad is not None
    assert torch.equal(grad, torch.full((3,), 8.0, dtype=torch.float64))


def test_pull_back_is_the_vector_jacobian_product_of_the_inner_loop() -> None:
    bench = bench_of()
    ctx = bench.ctx
    base = bench.run.adapted()
    used = {k: p for k, p in base.items() if "pooler" not in k and "classifier" in k}
    adapted = {k: p - 0.1 * p.pow(2) for k, p in used.items()}
    leaves = {k: p.detach().requires_grad_() for k, p in adapted.items()}
    ctx.accumulate(sum(leaf.pow(3).sum() for leaf in leaves.values()))
    ctx.accumulate(sum(leaf.sum() for leaf in leaves.values()))  # the cut: backward as often as one likes
    ctx.pull_back(adapted, leaves)
    for name, parameter in used.items():
        jacobian = 1 - 0.2 * parameter.detach()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, jacobian * (3 * leaves[name].detach() ** 2 + 1))


def test_only_the_last_backward_of_a_step_synchronises() -> None:
    bench, batch = bench_of(), make_batch()
    bench.step([batch] * 3)
    assert bench.ctx.trace.text() == "F4 b F4 b F4 B S"
    with bench.ctx.no_sync():
        with bench.ctx.no_sync(False):  # an inner scope cannot switch it on again
            bench.ctx.accumulate(loss_of(bench))
    assert bench.ctx.trace.text().endswith("F4 b")
    assert bench.ctx.synchronise


# ---- weights ---------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(size=st.floats(1e-8, 1e8), fails=st.booleans())
def test_moved_weights_are_restored_to_the_bit(size: float, fails: bool) -> None:
    bench = set_up([], tiny_bert(num_labels=3), make_batch())
    before = bench.parameters()
    offsets = {k: size * torch.randn(p.shape) for k, p in before.items()}

    def move() -> None:
        with bench.ctx.moved(offsets):
            inside = bench.parameters()
            assert all(torch.equal(inside[k], before[k] + offsets[k]) for k in before)
            if fails:
                raise RuntimeError("struck")

    if fails:
        with pytest.raises(RuntimeError, match="struck"):
            move()
    else:
        move()
    assert equal(bench.parameters(), before)


def test_swapped_holds_the_values_keeps_identity_and_nests() -> None:
    bench = bench_of()
    before, ids = bench.parameters(), {k: id(p) for k, p in bench.run.optimised().items()}
    zeros = {k: torch.zeros_like(p) for k, p in before.items()}
    with bench.ctx.swapped(zeros):
        with bench.ctx.moved({"classifier.bias": torch.ones(3)}):
            assert bench.run.optimised()["classifier.bias"].sum() == 3
        assert equal(bench.parameters(), zeros)
        assert {k: id(p) for k, p in bench.run.optimised().items()} == ids
    assert equal(bench.parameters(), before)


def test_resting_parameters_keep_no_gradient_of_an_earlier_step() -> None:
    """The optimizer would apply it again; afterwards they are trainable, also after an error."""
    bench = bench_of(lr=0.1)
    bench.step([make_batch()])
    names = [name for name in bench.run.may_optimise if "layer.0" in name]
    before = bench.parameters()
    with pytest.raises(RuntimeError, match="struck"), bench.ctx.resting(names):
        assert not bench.run.optimised().keys() & set(names)
        assert all(bench.run.may_optimise[name].grad is None for name in names)
        bench.run.optimizer.step()
        raise RuntimeError("struck")
    assert all(torch.equal(bench.run.may_optimise[name], before[name]) for name in names)
    assert bench.run.optimised().keys() == before.keys()


# ---- the update ------------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_once_over_the_whole_step() -> None:
    batch = make_batch()
    bench = bench_of(lr=1.0)
    free = bench_of().gradients([batch, batch])
    norm = torch.nn.utils.get_total_norm(list(free.values()))
    bench.run.clip = float(norm) / 10
    before = bench.parameters()
    terms = bench.step([batch, batch])
    moved = {k: before[k] - p for k, p in bench.parameters().items()}
    torch.testing.assert_close(terms["gradient_norm"].double(), norm.double(), rtol=1e-6, atol=0)
    for name, gradient in free.items():
        torch.testing.assert_close(moved[name], gradient / 10, rtol=1e-6, atol=1e-12)


def test_a_small_gradient_is_not_clipped() -> None:
    bench = bench_of()
    bench.run.clip = 1e6
    assert equal(bench.gradients([make_batch()]), bench_of().gradients([make_batch()]))


class Poisoned(SimpleTask):
    """Loss or gradient of the rows of one batch is not finite."""

    def __init__(self, first_row: int, value: float, *, gradient_only: bool = False) -> None:
        super().__init__()
        self.first_row, self.value, self.gradient_only = first_row, value, gradient_only

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        out = super().loss(ctx, batch, view)
        value, unit = out.terms["loss"]
        if batch.rows[0] == self.first_row:
            if self.gradient_only:
                value.register_hook(lambda g: g * self.value)
            else:
                value = value * self.value
        return Out({"loss": (value, unit)}, out.logits, None, view)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(value: float) -> None:
    bench = bench_of(lr=0.1, task=Poisoned(40, value))
    bench.run.step = 6
    before = bench.parameters()
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is not finite on rows \[40, 41, 42, 43\]") as caught:
        bench.step([make_batch(), make_batch(first_row=40)])
    assert "update was not made" in str(caught.value)
    assert equal(bench.parameters(), before)
    assert bench.run.step == 6


def test_a_non_finite_gradient_of_a_finite_loss_stops_too() -> None:
    bench = bench_of(lr=0.1, task=Poisoned(0, float("nan"), gradient_only=True))
    before = bench.parameters()
    with pytest.raises(NonFiniteError, match="loss is finite but the gradient norm is nan"):
        bench.step([make_batch()])
    assert equal(bench.parameters(), before)


def test_an_overflow_under_a_dynamic_loss_scale_skips_the_step_and_halves_the_scale() -> None:
    bench = bench_of(lr=0.1, loss_scale=1024.0, task=Poisoned(0, float("inf"), gradient_only=True))
    before = bench.parameters()
    bench.step([make_batch()])
    assert equal(bench.parameters(), before)
    assert bench.run.loss_scale.value == 512.0
    bench.step([make_batch(first_row=40)])
    assert not equal(bench.parameters(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_is_no_matter_of_the_loss_scale(value: float) -> None:
    bench = bench_of(lr=0.1, loss_scale=1024.0, task=Poisoned(40, value))
    before = bench.parameters()
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is not finite on rows \[40, 41, 42, 43\]"):
        bench.step([make_batch(), make_batch(first_row=40)])
    assert equal(bench.parameters(), before)
    assert bench.run.loss_scale.value == 1024.0


def test_the_loss_scale_has_a_floor_at_which_an_overflow_stops_the_run() -> None:
    bench = bench_of(lr=0.1, loss_scale=4.0, task=Poisoned(0, float("nan"), gradient_only=True))
    for scale in (2.0, 1.0):
        bench.step([make_batch()])
        assert bench.run.loss_scale.value == scale
    said = (
        r"step 3: the loss is finite but the gradient norm is nan at the smallest loss scale, 1, on rows \[0, 1, 2, 3\]"
    )
    with pytest.raises(NonFiniteError, match=said):
        bench.step([make_batch()])
    assert bench.run.loss_scale.value == 1.0


def test_an_overflow_in_an_inner_loop_is_told_from_a_bad_loss() -> None:
    """Its gradient spoils the parameters of the query pass, whose loss then is not finite."""
    bench = bench_of(lr=0.1, loss_scale=4.0)
    ctx, weight = bench.ctx, next(iter(bench.run.optimised().values()))

    def gradient(ctx: Context, works: Any) -> dict[str, Tensor]:
        inner = (weight * 0).sum()
        inner.register_hook(lambda g: g * float("inf"))
        (way,) = ctx.grad(inner, [weight])
        assert way is not None
        ctx.witness.append(((0,), way.sum()))
        return {}

    ctx.gradient = gradient
    bench.step([make_batch()])
    assert bench.run.loss_scale.value == 2.0


@pytest.mark.filterwarnings("error")
def test_the_schedule_counts_skipped_steps_as_the_run_does() -> None:
    bench = bench_of(lr=1.0, loss_scale=1024.0, task=Poisoned(0, float("inf"), gradient_only=True))
    bench.run.scheduler = torch.optim.lr_scheduler.LambdaLR(bench.run.optimizer, lambda step: 0.5**step)
    for first_row in (0, 40, 0):
        bench.step([make_batch(first_row=first_row)])
        assert bench.run.optimizer.param_groups[0]["lr"] == 0.5**bench.run.step


def test_the_schedule_ticks_once_per_optimizer_step() -> None:
    bench = bench_of(lr=1.0)
    bench.run.scheduler = torch.optim.lr_scheduler.LambdaLR(bench.run.optimizer, lambda step: 0.5**step)
    for step in range(3):
        assert bench.run.optimizer.param_groups[0]["lr"] == 0.5**step
        bench.step([make_batch(), make_batch()])


def test_a_step_starts_without_old_gradients() -> None:
    bench, batch = bench_of(), make_batch()
    first = bench.gradients([batch])
    assert equal(bench.gradients([batch]), first)
    assert len(bench.ctx.witness) == 1


def test_the_step_minimises_the_weighted_sum() -> None:
    bench, batch = bench_of(), make_batch()
    gradient = bench.gradients([batch])
    loss = weighted_sum(bench.ctx.task_loss(batch, View()).terms, {"rows": 1 / 4})
    wanted = torch.autograd.grad(loss, list(bench.run.optimised().values()), allow_unused=True)
    for (name, _), g in zip(bench.run.optimised().items(), wanted, strict=True):
        if g is not None:
            torch.testing.assert_close(gradient[name], g)


def test_a_held_schedule_ticks_at_the_last_update_alone() -> None:
    bench = set_up([], tiny_bert(num_labels=3), make_batch(), lr=1.0)
    run, ctx = bench.run, bench.ctx
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
    with ctx.holding_schedule():
        with ctx.holding_schedule(False):  # an inner last one is not the outer's
            bench.step([make_batch()])
        bench.step([make_batch()])
    assert run.scheduler.get_last_lr() == [1.0]
    with ctx.holding_schedule(False):
        bench.step([make_batch()])
    assert run.scheduler.get_last_lr() == [0.5]
