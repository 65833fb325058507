"""`lion`, `muon` and `schedule-free`: the papers' formulas, the libraries, state saved midway, groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.lion import Lion
from hybridengine_plugins.optim.muon import Muon, _orthonormal
from hybridengine_plugins.optim.schedule_free import ScheduleFree

METHODS: dict[str, Any] = {"lion": Lion(weight_decay=0.05), "muon": Muon(weight_decay=0.05)}
METHODS["schedule-free"] = ScheduleFree(weight_decay=0.05, beta2=0.99)
RATE = 0.1


def run_of(model: Any = None) -> Any:
    run = set_up([], model or tiny_bert(num_labels=3), make_batch()).run
    run.config.train.lr = RATE
    return run


def draws(shape: tuple[int, ...], count: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(count)]


def trained(method: Any, start: Tensor, gradients: list[Tensor], **options: Any) -> tuple[nn.Parameter, Any]:
    value = nn.Parameter(start.clone())
    optimizer = method.build_optimizer(run_of(), [ParamGroup({"w": value}, **options)])
    for g in gradients:
        value.grad = g.clone()
        optimizer.step()
    return value, optimizer


# ---- lion ------------------------------------------------------------------------------------------------------------


def test_lion_follows_the_paper() -> None:
    start, gradients = torch.ones(3, 4, dtype=torch.float64), draws((3, 4))
    value, _ = trained(Lion(beta1=0.8, beta2=0.7, weight_decay=0.05), start, gradients)
    w, m = start, torch.zeros_like(start)
    for g in gradients:  # Chen et al., program 1
        w = w - RATE * ((0.8 * m + 0.2 * g).sign() + 0.05 * w)
        m = 0.7 * m + 0.3 * g
    torch.testing.assert_close(value.detach(), w, rtol=1e-12, atol=1e-12)


# ---- muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_muon_is_torchs_own_on_matrices(shape: tuple[int, int]) -> None:
    start, gradients = torch.ones(shape, dtype=torch.float32), draws(shape, dtype=torch.float32)
    value, _ = trained(Muon(weight_decay=0.05, momentum=0.9), start, gradients)
    other = nn.Parameter(start.clone())
    theirs = torch.optim.Muon([other], lr=RATE, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for g in gradients:
        other.grad = g.clone()
        theirs.step()
    # Both round each step of the iteration to bfloat16 (2^-8), at most in another order: some last places of a step.
    torch.testing.assert_close(value.detach(), other.detach(), rtol=0, atol=5 * RATE * 0.2 * 7**0.5 * 2**-7)


def test_orthonormal_rows_of_any_scale() -> None:
    for matrix in (draws((6, 40))[0], 1e-4 * draws((40, 6))[0], torch.zeros(3, 5)):
        sizes = torch.linalg.svdvals(_orthonormal(matrix).double())
        if matrix.any():
            assert (
                0.6 < float(sizes.min()) and float(sizes.max()) < 1.3
            )  # Jordan et al.: within [0.7, 1.2] before rounding
        else:
            assert not sizes.any()


def test_muon_takes_adamw_steps_elsewhere() -> None:
    start, gradients = torch.ones(5, dtype=torch.float64), draws((5,))
    value, _ = trained(Muon(), start, gradients)
    other = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([other], lr=RATE, weight_decay=0.0)  # vectors are not decayed
    for g in gradients:
        other.grad = g.clone()
        adamw.step()
    torch.testing.assert_close(value.detach(), other.detach(), rtol=1e-12, atol=1e-12)


def test_muon_leaves_embeddings_head_and_vectors_to_adamw() -> None:
    run = run_of()
    optimizer = Muon().build_optimizer(run, [ParamGroup(dict(run.may_optimise), lr=7e-3)])
    names = {id(p): name for name, p in run.may_optimise.items()}
    hidden = {names[id(p)] for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    assert "bert.encoder.layer.1.output.dense.weight" in hidden and "bert.pooler.dense.weight" in hidden
    assert not [n for n in hidden if "embeddings" in n or n.startswith("classifier") or not n.endswith("weight")]


# ---- schedule-free ---------------------------------------------------------------------------------------------------


def schedule_free(start: Tensor, gradients: list[Tensor], rates: list[float]) -> tuple[Tensor, Tensor]:
    """Defazio et al., algorithm 1, with x, y and z kept apart; gradients are given, so y only serves the decay."""
    x = z = y = start
    v, total = torch.zeros_like(start), 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        v = 0.99 * v + 0.01 * g**2
        z = z - rate * (g / ((v / (1 - 0.99**t)).sqrt() + 1e-8) + 0.05 * y)
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
        y = 0.1 * z + 0.9 * x
    return x, y


def test_schedule_free_follows_the_paper_through_a_warm_up() -> None:
    start, gradients, rates = torch.ones(3, 4, dtype=torch.float64), draws((3, 4), 6), [0.02, 0.05, 0.1, 0.1, 0.1, 0.1]
    value = nn.Parameter(start.clone())
    optimizer: Any = METHODS["schedule-free"].build_optimizer(run_of(), [ParamGroup({"w": value})])
    for g, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        value.grad = g.clone()
        optimizer.step()
    x, y = schedule_free(start, gradients, rates)
    torch.testing.assert_close(value.detach(), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(optimizer.average(value), x, rtol=1e-11, atol=1e-11)


def test_schedule_free_is_the_authors_library() -> None:
    library = pytest.importorskip("schedulefree")
    start, gradients = torch.ones(3, 4, dtype=torch.float64), draws((3, 4), 6)
    value, optimizer = trained(METHODS["schedule-free"], start, gradients)
    other = nn.Parameter(start.clone())
    theirs = library.AdamWScheduleFree([other], lr=RATE, betas=(0.9, 0.99), weight_decay=0.05)
    theirs.train()
    for g in gradients:
        other.grad = g.clone()
        theirs.step()
    torch.testing.assert_close(value.detach(), other.detach(), rtol=1e-10, atol=1e-10)
    theirs.eval()
    torch.testing.assert_close(optimizer.average(value), other.detach(), rtol=1e-10, atol=1e-10)


def test_evaluation_sees_the_average_and_training_goes_on_from_its_own_weights() -> None:
    method = ScheduleFree(warmup=0)
    bench = set_up([method], tiny_bert(num_labels=3).double(), make_batch())
    bench.run.config.train.lr = RATE
    bench.run.optimizer = optimizer = method.build_optimizer(bench.run, [ParamGroup(dict(bench.run.may_optimise))])
    with method.wrap_evaluation(bench.ctx):
        pass  # before the first step there is no average
    for _ in range(3):
        bench.step([make_batch()])
    before = bench.parameters()
    with method.wrap_evaluation(bench.ctx):
        inside = bench.parameters()
    assert all(torch.equal(before[name], value) for name, value in bench.parameters().items())
    weights = bench.run.may_optimise
    assert all(torch.equal(inside[name], optimizer.average(weights[name])) for name in inside)
    assert any(not torch.equal(inside[name], before[name]) for name in inside)


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_saved_midway_it_goes_on_bit_for_bit(name: str) -> None:
    gradients = draws((4, 6), 6, torch.float32)
    whole, _ = trained(METHODS[name], torch.ones(4, 6), gradients)
    half, first = trained(METHODS[name], torch.ones(4, 6), gradients[:2])
    other = nn.Parameter(half.detach().clone())
    second = METHODS[name].build_optimizer(run_of(), [ParamGroup({"w": other})])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for g in gradients[2:]:
        other.grad = g.clone()
        second.step()
    assert torch.equal(other, whole)


@pytest.mark.parametrize("name", METHODS)
def test_groups_keep_their_rates_and_what_has_no_gradient_rests(name: str) -> None:
    moving, resting = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups = [ParamGroup({"a": moving, "b": resting}, lr=7e-3)]
    optimizer = METHODS[name].build_optimizer(run_of(), groups)
    assert {group["lr"] for group in optimizer.param_groups} == {7e-3}
    moving.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(resting, torch.ones(2, 2)) and not torch.equal(moving, torch.ones(2, 2))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_model_falls(name: str) -> None:
    method = METHODS[name]
    bench = set_up([method], tiny_bert(num_labels=3), make_batch())
    bench.run.config.train.lr = {"lion": 1e-3, "muon": 1e-2, "schedule-free": 1e-2}[name]
    bench.run.optimizer = method.build_optimizer(bench.run, [ParamGroup(dict(bench.run.may_optimise))])
    losses = [float(sum(bench.step([make_batch()]).values())) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
