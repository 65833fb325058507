"""Keyed randomness: every draw is a function of what it is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine.errors import ConfigError
from hybridengine.model import choose_device
from hybridengine.seams import KeyedRows, View, mix, permutation, randomness
from hybridengine.stack.toy import toy_run
from hybridengine.testing import Bench, make_batch, set_up, tiny_bert, tiny_config

ROWS = st.lists(st.integers(0, 2**43), min_size=1, max_size=5, unique=True)


def bench_with_dropout() -> Bench:
    return set_up([], tiny_bert(num_labels=3, hidden_dropout_prob=0.3), make_batch())


def logits(bench: Bench, view: View) -> Tensor:
    with torch.no_grad():
        return bench.ctx.outputs(make_batch(), [view])[0].scores


def test_equal_keys_draw_equal_masks_and_forks_others() -> None:
    bench = bench_with_dropout()
    assert torch.equal(logits(bench, View(key=1)), logits(bench, View(key=1)))
    assert not torch.equal(logits(bench, View(key=1)), logits(bench, View(key=2)))
    assert not torch.equal(logits(bench, View(key=1)), logits(bench, View(key=1).fork("other")))


def test_without_a_key_dropout_draws_from_the_global_stream() -> None:
    bench = bench_with_dropout()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = logits(bench, View()), logits(bench, View())
        torch.manual_seed(0)
        assert torch.equal(logits(bench, View()), first)
    assert not torch.equal(first, second)


def test_a_keyed_forward_neither_reads_nor_moves_the_global_stream() -> None:
    bench = bench_with_dropout()
    before = torch.get_rng_state()
    one = logits(bench, View(key=1))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert torch.equal(logits(bench, View(key=1)), one)


def test_on_another_device_draws_on_the_host_are_keyed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer drop is a `torch.rand([])` whatever the model's device."""
    other = torch.Generator()
    monkeypatch.setattr(randomness, "generator_of", lambda device: other)
    host, device = torch.get_rng_state(), other.get_state()
    draws = []
    for _ in range(2):
        torch.rand(3)
        moved = torch.get_rng_state()
        with randomness.dropout_key(torch.device("cuda", 0), 5):
            draws.append((float(torch.rand([])), float(torch.rand([], generator=other))))
        assert torch.equal(torch.get_rng_state(), moved)
        assert torch.equal(other.get_state(), device)
    torch.set_rng_state(host)
    assert draws[0] == draws[1]


def test_a_gpu_without_number_means_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(torch.Generator() for _ in range(3)))
    for wish, device in (("cuda", "cuda:2"), ("auto", "cuda:2"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert choose_device(wish) == torch.device(device)
    assert randomness.generator_of(torch.device("cuda")) is torch.cuda.default_generators[2]
    assert randomness.generator_of(torch.device("cuda:0")) is torch.cuda.default_generators[0]
    with pytest.raises(ConfigError, match="there are 3 GPUs"):
        choose_device("cuda:3")


def test_planning_leaves_the_callers_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds every GPU as well, at once or as soon as there is a context."""
    touched: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    before = torch.get_rng_state()
    weights = [toy_run(tiny_config(), 3, 4)[0].model.classifier.weight for _ in range(2)]
    assert touched == []
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*weights)


def test_the_global_stream_is_restored_after_an_exception() -> None:
    bench = bench_with_dropout()
    before = torch.get_rng_state()

    def fail(*_: object) -> None:
        torch.rand(3)
        raise RuntimeError("struck")

    bench.run.model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="struck"):
        logits(bench, View(key=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_whole_step_leaves_the_global_stream_alone() -> None:
    bench = bench_with_dropout()
    before = torch.get_rng_state()
    bench.step([make_batch()])
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_between_steps_and_micro_batches() -> None:
    bench, batch = bench_with_dropout(), make_batch()
    losses = [float(bench.step([batch])["loss"]) for _ in range(2)]
    assert losses[0] != losses[1]
    keys = []
    forward = bench.ctx.outputs
    bench.ctx.outputs = lambda batch, views, **kw: (keys.append(views[0].key), forward(batch, views, **kw))[1]
    bench.step([batch, batch])
    assert len(set(keys)) == 2


@settings(max_examples=25)
@given(rows=ROWS, short=st.integers(1, 6), more=st.integers(0, 9), width=st.integers(1, 5))
def test_a_longer_draw_starts_with_the_shorter_one(rows: list[int], short: int, more: int, width: int) -> None:
    """Hence padding changes nothing."""
    for kind in ("uniform", "normal"):
        draw = getattr(KeyedRows((0, "x", 0), rows), kind)
        assert torch.equal(draw(short + more, width)[:, :short], draw(short, width))


@settings(max_examples=25)
@given(rows=ROWS, data=st.data())
def test_a_rows_numbers_do_not_depend_on_its_company(rows: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    some = shuffled[: data.draw(st.integers(1, len(rows)))]
    whole = KeyedRows((3, "x", 1), rows).uniform(4)
    part = KeyedRows((3, "x", 1), some).uniform(4)
    for index, row in enumerate(some):
        assert torch.equal(part[index], whole[rows.index(row)])


def test_numbers_differ_by_seed_stream_step_and_row() -> None:
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    draws = [KeyedRows(key, (row,)).uniform(8) for key in keys for row in (0, 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_ctx_rng_follows_the_optimizer_step() -> None:
    bench = bench_with_dropout()
    first = bench.ctx.rng("x", (0, 1)).uniform(4)
    assert torch.equal(first, bench.ctx.rng("x", (0, 1)).uniform(4))
    assert torch.equal(first, bench.run.random("x", (0, 1)).uniform(4))
    bench.run.step += 1
    assert not torch.equal(first, bench.ctx.rng("x", (0, 1)).uniform(4))


def test_draws_are_fp32_and_have_their_distribution() -> None:
    uniform = KeyedRows((0,), range(50)).uniform(400)
    normal = KeyedRows((0,), range(50)).normal(400)
    assert uniform.dtype == normal.dtype == torch.float32
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # 20,000 numbers: five standard errors of the mean are 0.0102 and 0.035.
    assert abs(float(uniform.mean()) - 0.5) < 0.0102
    assert abs(float(normal.mean())) < 0.035
    assert abs(float(normal.std()) - 1) < 0.025
    assert torch.isfinite(normal).all()


@given(st.integers(0, 200), st.integers(0, 5))
def test_permutation_is_a_function_of_its_key(size: int, key: int) -> None:
    order = permutation(size, 0, "order", key)
    assert sorted(order) == list(range(size))
    assert order == permutation(size, 0, "order", key)


def test_mix_is_stable_between_processes_and_fits_a_generator() -> None:
    assert mix(0, "order", 1) == 3286871379868953  # a checkpoint's data order must be found again tomorrow
    assert 0 <= mix("a") < 2**56
    assert len({mix(0, 1), mix(1, 0), mix("0", 1), mix((0, 1))}) == 4


def test_beta_numbers_belong_to_their_row_and_have_its_moments() -> None:
    rows = KeyedRows((0, "share"), range(4000))
    for alpha in (0.4, 1.0, 8.0):
        drawn = rows.beta(alpha)
        assert torch.equal(drawn[7:9], KeyedRows((0, "share"), (7, 8)).beta(alpha))
        assert drawn.dtype == torch.float64 and ((drawn >= 0) & (drawn <= 1)).all()
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(drawn.mean() - 0.5) < 4 * (variance / 4000) ** 0.5
        assert abs(drawn.var() / variance - 1) < 0.1
