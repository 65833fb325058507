"""`ctx`: evaluating, stacking, precision, sharing, functional parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridengine import kernels
from hybridengine.errors import SeamError
from hybridengine.kernels import native
from hybridengine.plugin import Run, Traits, hook
from hybridengine.seams import Batch, Context, Out, View, Work
from hybridengine.seams.precision import Precision
from hybridengine.testing import Bench, make_batch, set_up, tiny_bert, tiny_gpt2

BF16 = Precision("bf16", torch.bfloat16)


def bench_of(*methods: object, dropout: float = 0.0, **options: Any) -> Bench:
    model = options.pop("model", None)
    model = tiny_bert(num_labels=3, hidden_dropout_prob=dropout) if model is None else model
    return set_up(methods, model, make_batch(), **options)


def logits(bench: Bench, view: View, **options: Any) -> Tensor:
    out = bench.ctx.outputs(make_batch(), [view], **options)[0].logits
    assert out is not None
    return out


# ---- precision -------------------------------------------------------------------------------------------------------


def test_each_forward_opens_its_own_autocast() -> None:
    bench = bench_of(precision=BF16)
    assert logits(bench, View()).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert logits(bench_of(), View()).dtype == torch.float32


def test_an_outer_autocast_is_not_inherited() -> None:
    bench = bench_of()
    with torch.autocast("cpu", torch.bfloat16):
        inside = logits(bench, View())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, logits(bench, View()))


def test_moved_weights_are_not_read_from_a_cast_cache() -> None:
    """Under a caller's autocast the cast cache lives on between forwards; with it SAM would be nearly a no-op."""
    bench = bench_of(precision=BF16)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(bench, View()).detach().clone()
        with bench.ctx.moved({"classifier.weight": torch.full((3, 32), 0.5)}):  # casts of matrices are what it keeps
            moved = logits(bench, View()).detach().clone()
        after = logits(bench, View()).detach()
    assert not torch.equal(before, moved)
    assert torch.equal(before, after)


# ---- several views ---------------------------------------------------------------------------------------------------


def passes(bench: Bench, views: list[View], batch: Batch | None = None) -> str:
    bench.ctx.trace.clear()
    bench.ctx.outputs(batch or make_batch(), views)
    return bench.ctx.trace.text()


def test_only_views_with_distinct_keys_and_the_same_params_are_stacked() -> None:
    bench = bench_of()
    one, two = View(key=1), View(key=2)
    assert passes(bench, [one, two]) == "F8"
    assert passes(bench, [one, two, View(key=3)]) == "F12"
    assert passes(bench, [one, one]) == "F4 F4"  # equal keys must see equal masks
    params = {k: p.detach() for k, p in bench.run.adapted().items()}
    assert passes(bench, [one, replace(two, params=params)]) == "F4 F4"
    assert passes(bench, [replace(one, params=params), replace(two, params=params)]) == "F8"
    assert passes(bench, [one, two], make_batch(parts={"unlabelled": make_batch()})) == "F4 F4"
    assert passes(bench_of(stack_views=False), [one, two]) == "F4 F4"


@dataclass(eq=False)
class OneDraw:
    """Draws once for each forward pass."""

    traits = Traits(stackable=False)


def test_a_method_that_draws_once_a_pass_makes_views_run_apart() -> None:
    assert passes(bench_of(OneDraw(), stack_views=True), [View(key=1), View(key=2)]) == "F4 F4"


def test_stacked_and_looped_views_agree_without_dropout_and_carry_their_own_delta() -> None:
    stacked, looped = bench_of(), bench_of(stack_views=False)
    zero = stacked.ctx.zeros(make_batch())
    moved = View(key=1).plus({site: torch.full_like(z, 0.1) for site, z in zero.items()})
    views = [moved, View(key=2)]
    for a, b in zip(stacked.ctx.outputs(make_batch(), views), looped.ctx.outputs(make_batch(), views), strict=True):
        torch.testing.assert_close(a.logits, b.logits)
        assert a.view is b.view
        assert (a.replay, b.replay) == (False, True)


@pytest.mark.parametrize("stacked", [False, True])
def test_several_gives_the_mean_of_the_terms_and_an_out_per_view(stacked: bool) -> None:
    bench, batch = bench_of(stack_views=stacked), make_batch()
    zero = bench.ctx.zeros(batch)
    views = [View(key=1), View(key=2).plus({site: torch.full_like(z, 0.3) for site, z in zero.items()})]
    terms, outs = bench.ctx.several(lambda ctx, b, v: ctx.task_loss(b, v), batch, views)
    single = [bench.ctx.task_loss(batch, view).terms["loss"] for view in views]
    torch.testing.assert_close(terms["loss"][0], (single[0][0] + single[1][0]) / 2)
    assert terms["loss"][1] == "rows"
    assert [out.replay for out in outs] == [not stacked] * 2
    for out, view in zip(outs, views, strict=True):
        torch.testing.assert_close(out.logits, logits(bench, view))


# ---- outputs ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Halve:
    """Halves the logits, in the order of its turn."""

    name = "halve"
    traits = Traits(order=10)

    @hook
    def transform_outputs(self, ctx: Context, batch: Batch, outputs: Any) -> Any:
        outputs.logits = outputs.logits / 2
        return outputs


@dataclass(eq=False)
class AddOne:
    """Adds one, after `Halve`."""

    name = "add-one"
    traits = Traits(order=20)

    @hook
    def transform_outputs(self, ctx: Context, batch: Batch, outputs: Any) -> Any:
        outputs.logits = outputs.logits + 1
        return outputs


def test_outputs_are_transformed_in_order_but_not_those_of_another_model() -> None:
    plain = logits(bench_of(), View())
    bench = bench_of(AddOne(), Halve())
    torch.testing.assert_close(logits(bench, View()), plain / 2 + 1)
    torch.testing.assert_close(logits(bench, View(), model=bench.run.copy_of_model()), plain)


def test_features_on_request() -> None:
    bench = bench_of()
    (out,) = bench.ctx.outputs(make_batch(), [View()], features=True)
    assert out.features is not None
    assert out.features.shape == (4, 7, 32)
    assert bench.ctx.outputs(make_batch(), [View()])[0].features is None
    stacked = bench.ctx.outputs(make_batch(), [View(key=1), View(key=2)], features=True)
    for one in stacked:
        torch.testing.assert_close(one.features, out.features)


# ---- functional parameters -------------------------------------------------------------------------------------------


def test_functional_parameters_stand_in_for_the_models_own() -> None:
    bench = bench_of()
    params = {k: p.detach() + 0.01 for k, p in bench.run.adapted().items()}
    through_view = logits(bench, View(params=params))
    with bench.ctx.swapped(params):
        torch.testing.assert_close(through_view, logits(bench, View()))
    assert not torch.allclose(through_view, logits(bench, View()))


def test_gradients_go_to_the_leaves_the_view_holds() -> None:
    bench, batch = bench_of(), make_batch()
    leaves = {k: p.detach().clone().requires_grad_() for k, p in bench.run.adapted().items()}
    bench.ctx.accumulate(bench.ctx.task_loss(batch, View(params=leaves)).terms["loss"][0])
    assert all(p.grad is None for p in bench.run.optimised().values())
    assert all(leaf.grad is not None for k, leaf in leaves.items() if "word_embeddings" in k or "classifier" in k)


def test_tied_weights_are_replaced_together() -> None:
    """GPT2's head is its embedding table: replacing only one of the two would evaluate another model."""
    model = tiny_gpt2().double()
    bench = set_up([], model, make_batch())
    name = "transformer.wte.weight"
    assert model.lm_head.weight is model.transformer.wte.weight
    value = {name: bench.run.adapted()[name].detach() * 1.5}
    through_view = logits(bench, View(params=value))
    with bench.ctx.swapped(value):
        torch.testing.assert_close(through_view, logits(bench, View()))


def test_functional_parameters_under_gradient_checkpointing_are_refused() -> None:
    bench = bench_of()
    bench.run.model.gradient_checkpointing_enable({"use_reentrant": False})
    logits(bench, View())
    with pytest.raises(SeamError, match="functional parameters cannot be used with gradient checkpointing"):
        logits(bench, View(params=dict(bench.run.adapted())))


def test_checkpointed_recomputation_sees_the_same_masks() -> None:
    batch, grads = make_batch(), []
    for checkpointing in (False, True):
        bench = bench_of(model=tiny_bert(num_labels=3, hidden_dropout_prob=0.3).double())
        if checkpointing:
            bench.run.model.gradient_checkpointing_enable({"use_reentrant": False})
        grads.append(bench.gradients([batch]))
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)


def test_a_run_modules_parameter_follows_the_view() -> None:
    @dataclass(eq=False)
    class Scaled:
        """Scales the logits by a learned number of its own."""

        traits = Traits()

        @hook
        def on_run_start(self, run: Run) -> None:
            run.add_module("scale", nn.ParameterDict({"by": nn.Parameter(torch.ones(()))}))

        @hook
        def transform_outputs(self, ctx: Context, batch: Batch, outputs: Any) -> Any:
            outputs.logits = outputs.logits * ctx.value("scale/by", ctx.run.module("scale")["by"])
            return outputs

    bench = bench_of(Scaled())
    plain = logits(bench, View())
    torch.testing.assert_close(logits(bench, View(params={"scale/by": torch.tensor(3.0)})), 3 * plain)
    torch.testing.assert_close(logits(bench, View()), plain)
    gradient = bench.gradients([make_batch()])
    assert gradient["scale/by"].abs() > 0


def test_second_order_scope_allows_a_double_backward() -> None:
    bench = bench_of(model=tiny_bert(num_labels=3, attn_implementation="sdpa"))
    with bench.ctx.second_order():
        loss = bench.ctx.task_loss(make_batch(), View()).terms["loss"][0]
        weights = list(bench.run.adapted().values())
        grads = [g for g in bench.ctx.grad(loss, weights, create_graph=True) if g is not None]
        sum(g.square().sum() for g in grads).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


# ---- sharing, effects ------------------------------------------------------------------------------------------------


def test_shared_computes_once_per_work_inside_sharing_only() -> None:
    bench, batch = bench_of(), make_batch()
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    first, second = Work(batch, {}, id=0), Work(batch, {}, id=1)
    ctx = bench.ctx
    assert [ctx.shared("x", first, make) for _ in range(2)] == [0, 1]
    with ctx.sharing():
        assert [ctx.shared("x", first, make) for _ in range(2)] == [2, 2]
        assert ctx.shared("y", first, make) == 3
        assert ctx.shared("x", second, make) == 4  # equal rows, another work
        with ctx.sharing():
            assert ctx.shared("x", first, make) == 5
        assert ctx.shared("x", first, make) == 2
    assert ctx.shared("x", first, make) == 6


@dataclass(eq=False)
class Reporting:
    """Reports what it is told to."""

    name = "reporting"
    traits = Traits(effect="size")

    @hook
    def wrap_loss(self, inner: Any, ctx: Context, batch: Batch, view: View) -> Out:
        ctx.report(self, size=torch.tensor(2.0, requires_grad=True), other=3.0)
        return inner(ctx, batch, view)


def test_reported_effects_are_kept_without_a_graph() -> None:
    method = Reporting()
    bench = bench_of(method)
    bench.step([make_batch()])
    assert bench.effect("reporting", "size") == 2.0
    assert bench.effect("reporting", "other") == 3.0


def test_a_stranger_cannot_report() -> None:
    bench = bench_of(Reporting())
    with pytest.raises(ValueError, match=r"not a member of this stack; call ctx\.report\(self"):
        bench.ctx.report(Reporting(), size=1.0)


# ---- dropout on CPUs -------------------------------------------------------------------------------------------------


def drawn() -> int:
    return kernels.used().get("dropout", {}).get("cpu", 0)


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")
def test_large_batches_draw_dropout_by_the_kernel_and_keys_still_pin_it() -> None:
    batch = make_batch(32, 24)  # 24,576 elements in each hidden state
    bench = set_up([], tiny_bert(num_labels=3, hidden_dropout_prob=0.1), batch)
    bench.run.model.train()
    before, state = drawn(), torch.get_rng_state()
    first, again, other = (bench.ctx.outputs(batch, [View(key=key)])[0].scores for key in (1, 1, 2))
    assert drawn() > before
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    bench.run.model.eval()
    before = drawn()
    bench.ctx.outputs(batch, [View(key=1)])
    assert drawn() == before


@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")
def test_a_checkpointed_model_keeps_torchs_dropout_which_its_recomputation_repeats() -> None:
    """The recomputation runs outside the forward: with the kernel it would draw other masks, and gradients be wrong."""
    batch = make_batch(32, 24)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_bert(num_labels=3, hidden_dropout_prob=0.1)
        bench = set_up([], model, batch)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        before = drawn()
        with kernels_of_torch() if not checkpointing else contextlib.nullcontext():
            out = bench.ctx.loss(bench.ctx, batch, View(key=1))
        assert drawn() == before
        gradients.append(torch.autograd.grad(out.terms["loss"][0], list(model.parameters()), allow_unused=True))
    for plain, recomputed in zip(*gradients, strict=True):
        # The same operations in the same order, run twice.
        assert (plain is None) == (recomputed is None) and (plain is None or torch.equal(plain, recomputed))


@contextlib.contextmanager
def kernels_of_torch() -> Iterator[None]:
    kernels.read_environment({"HYBRIDENGINE_IMPL": "dropout=reference"})
    try:
        yield
    finally:
        kernels.read_environment({})
