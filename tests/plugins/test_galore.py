"""GaLore against the paper's algorithm, AdamW where nothing is projected, and its own state saved midway."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.galore import GaLore, GaLoreAdamW

SHAPES = {"wide": (3, 5), "tall": (5, 3)}


def gradients(shape: tuple[int, ...], count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def reference(value: Tensor, grads: list[Tensor], rank: int, refresh: int, scale: float, decay: float) -> Tensor:
    """Zhao et al. 2024, algorithm 2, with Adam as rho; a tall matrix is a wide one lying down."""
    if value.shape[0] > value.shape[1]:
        return reference(value.T, [g.T for g in grads], rank, refresh, scale, decay).T
    m = v = torch.zeros(rank, value.shape[1], dtype=value.dtype)
    p = torch.zeros(value.shape[0], rank, dtype=value.dtype)
    for t, g in enumerate(grads, start=1):
        if (t - 1) % refresh == 0:
            # Eigenvectors of G G^T, largest last: another road than the singular value decomposition.
            found = torch.linalg.eigh(g @ g.T).eigenvectors.flip(1)[:, :rank]
            p = found if t == 1 else found * torch.where((found * p).sum(0) < 0, -1.0, 1.0)
        r = p.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.99 * v + 0.01 * r**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        value = value - 0.1 * decay * value - 0.1 * scale * p @ step
    return value


def built(values: dict[str, Tensor], **options: object) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    run.config.train.lr = 0.1
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    method = GaLore(**{"beta2": 0.99, "refresh": 3, "weight_decay": 0.05, **options})
    return parameters, method.build_optimizer(run, [ParamGroup(parameters)])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_follow_the_algorithm(shape: str, rank: int) -> None:
    start = torch.arange(15, dtype=torch.float64).reshape(SHAPES[shape]) / 7
    parameters, optimizer = built({"w": start}, rank=rank, scale=0.5)
    grads = gradients(SHAPES[shape])
    for g in grads:
        parameters["w"].grad = g.clone()
        optimizer.step()
    # The signs of the first directions cancel in P N, later ones follow them. The two roads to P differ by some
    # 1e-15, which Adam's division enlarges where a moment is small.
    torch.testing.assert_close(
        parameters["w"].detach(), reference(start, grads, rank, 3, 0.5, 0.05), rtol=1e-9, atol=1e-9
    )


def test_what_is_not_projected_takes_steps_of_adamw() -> None:
    values = {"w": gradients((3, 3))[0], "bias": gradients((4,))[0], "classifier.weight": gradients((6, 8))[0]}
    parameters, optimizer = built(values, rank=3)
    plain = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    groups = [{"params": [plain["w"], plain["classifier.weight"]]}, {"params": [plain["bias"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
    for step in range(4):
        for name, value in values.items():
            parameters[name].grad = plain[name].grad = gradients(tuple(value.shape))[step]
        optimizer.step()
        adamw.step()
    for name in values:
        torch.testing.assert_close(parameters[name].detach(), plain[name].detach(), rtol=1e-12, atol=1e-13)


def test_state_is_that_of_the_rank() -> None:
    parameters, optimizer = built({"w": torch.ones(30, 40)}, rank=4)
    parameters["w"].grad = torch.randn(30, 40)
    optimizer.step()
    kept = sum(v.numel() for v in optimizer.state[parameters["w"]].values() if isinstance(v, Tensor))
    assert kept == 2 * 4 * 40 + 4 * 30


def test_saved_midway_it_goes_on_bit_for_bit() -> None:
    parameters, optimizer = built({"w": torch.ones(4, 6), "b": torch.ones(6)}, rank=2)
    grads = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    other, twin = built({"w": torch.ones(4, 6), "b": torch.ones(6)}, rank=2)
    for index, g in enumerate(grads):
        if index == 2:
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            with torch.no_grad():
                [other[name].copy_(parameters[name]) for name in other]
        for one in (parameters, other) if index >= 2 else (parameters,):
            one["w"].grad, one["b"].grad = g.clone(), g[0].clone()
        optimizer.step()
        if index >= 2:
            twin.step()
    assert all(torch.equal(parameters[name], other[name]) for name in other)


def test_it_projects_matrices_of_the_encoder_alone() -> None:
    bench = set_up([], tiny_bert(num_labels=3), make_batch())
    run = bench.run
    optimizer = GaLore(rank=2).build_optimizer(run, [ParamGroup(dict(run.may_optimise), lr=7e-3)])
    assert isinstance(optimizer, GaLoreAdamW)
    names = {id(p): name for name, p in run.may_optimise.items()}
    low = {names[id(p)] for group in optimizer.param_groups if group["rank"] for p in group["params"]}
    assert "bert.encoder.layer.0.attention.self.query.weight" in low
    assert not [name for name in low if "embeddings" in name or name.startswith("classifier") or "bias" in name]
    assert {group["lr"] for group in optimizer.param_groups} == {7e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(run.may_optimise)


def test_a_rank_above_all_matrices_is_told() -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    GaLore(rank=999).build_optimizer(run, [ParamGroup(dict(run.may_optimise))])
    assert any("every step is plain AdamW's" in note for note in run.notes)


def test_a_single_number_moves_as_adamw_moves_it() -> None:
    parameters, optimizer = built(
        {"w": torch.randn(3, 5, dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    )
    parameters["scale"].grad = torch.tensor(2.0, dtype=torch.float64)
    optimizer.step()
    assert abs(float(parameters["scale"].detach()) - 0.9) < 1e-8  # the first step is as long as the learning rate
