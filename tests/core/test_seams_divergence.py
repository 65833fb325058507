"""The divergence of two evaluations, where a row has one label of several and where each label may apply."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine.seams import Batch, js_rows, kl_rows
from hybridengine.testing import make_batch

SOFTMAX, BERNOULLI = SimpleNamespace(distribution="softmax"), SimpleNamespace(distribution="bernoulli")
LOGITS = st.lists(st.floats(-12, 12), min_size=1, max_size=5)


def batch_of(logits: Tensor) -> Batch:
    return make_batch(len(logits))


def kl(p: Tensor, q: Tensor, task: object = BERNOULLI, temperature: float = 1.0) -> Tensor:
    return kl_rows(p, q, batch_of(p), task, temperature=temperature)


def wide(*logits: list[float]) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(-12, 12), st.floats(-12, 12)), min_size=1, max_size=5))
def test_it_is_positive_and_zero_for_equal_logits_alone(pairs: list[tuple[float, float]]) -> None:
    p, q = wide([a for a, _ in pairs]), wide([b for _, b in pairs])
    assert float(kl(p, p)) == 0
    assert float(kl(p, q)) > -1e-12
    if (p - q).abs().max() > 1e-2:
        assert float(kl(p, q)) > 1e-12


@settings(max_examples=100, deadline=None)
@given(p=LOGITS, seed=st.integers(0, 100), temperature=st.floats(0.3, 5))
def test_it_is_the_sum_of_the_two_class_divergences(p: list[float], seed: int, temperature: float) -> None:
    """A label that may apply or not is a choice between the logits x and 0."""
    first = wide(p)
    second = first + torch.randn(first.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    single = [
        kl(*(torch.stack([x, torch.zeros_like(x)], -1) for x in (first[:, c], second[:, c])), SOFTMAX, temperature)
        for c in range(first.shape[1])
    ]
    torch.testing.assert_close(kl(first, second, temperature=temperature), torch.stack(single).sum())


def test_it_sees_what_a_softmax_does_not() -> None:
    """All labels against none: a softmax over them is the same for both."""
    every, none = wide([3.0, 3.0]), wide([-3.0, -3.0])
    assert float(kl(every, none, SOFTMAX)) == pytest.approx(0, abs=1e-12)
    assert float(kl(every, none)) > 5


def test_it_sees_each_flipped_label() -> None:
    p = wide([2.0, -1.0, 3.0])
    values = [float(kl(p, torch.where(torch.arange(3) == c, -p, p))) for c in range(3)]
    assert min(values) > 0.4
    assert float(kl(p, -p)) == pytest.approx(sum(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("task", [SOFTMAX, BERNOULLI])
def test_values_and_gradients_are_finite_for_extreme_logits(task: object, dtype: torch.dtype) -> None:
    ends = torch.tensor([[1e4, -1e4, 1e4, -1e4, 0.0]], dtype=dtype)
    p, q = ends.clone().requires_grad_(), ends.flip(1).clone().requires_grad_()
    value = kl(p, q, task)
    value.backward()
    assert value.isfinite()
    for logits in (p, q):
        assert logits.grad is not None and logits.grad.isfinite().all()


def test_both_sides_have_the_gradient_of_the_formula() -> None:
    p, q = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl(a, b, temperature=2.0), (p, q))


def test_rows_add_up_and_other_distributions_are_refused() -> None:
    p, q = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    torch.testing.assert_close(kl(p, q), torch.stack([kl(p[i : i + 1], q[i : i + 1]) for i in range(4)]).sum())
    torch.testing.assert_close(kl_rows(p, q, batch_of(p)), kl(p, q, SOFTMAX))
    with pytest.raises(ValueError, match="'softmax' or 'bernoulli', not 'poisson'"):
        kl(p, q, SimpleNamespace(distribution="poisson"))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(LOGITS, min_size=2, max_size=4), bernoulli=st.booleans())
def test_jensen_shannon_is_the_divergence_from_the_mean(rows: list[list[float]], bernoulli: bool) -> None:
    width = min(map(len, rows))
    logits = [wide(row[:width]) for row in rows]
    if bernoulli:
        shares = [torch.stack([x.sigmoid(), (-x).sigmoid()], -1) for x in logits]
    else:
        shares = [x.softmax(-1) for x in logits]
    mean = sum(shares) / len(shares)
    wanted = sum((p * (p / mean).log()).sum() for p in shares) / len(shares)
    found = js_rows(logits, batch_of(logits[0]), BERNOULLI if bernoulli else SOFTMAX)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert -1e-12 < float(found) < len(shares) * width


def test_jensen_shannon_counts_scored_tokens_and_is_zero_for_equal_predictions() -> None:
    batch = make_batch(kind="tokens")
    p, q = (torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    mean = (p.softmax(-1) + q.softmax(-1)).log()
    wanted = (kl_rows(p, mean, batch) + kl_rows(q, mean, batch)) / 2
    torch.testing.assert_close(js_rows([p, q], batch), wanted, rtol=1e-12, atol=0)
    assert abs(float(js_rows([p, p, p], batch))) < 1e-14


@pytest.mark.parametrize("task", [SOFTMAX, BERNOULLI])
def test_rows_that_do_not_count_add_nothing_and_have_no_gradient(task: object) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    counted, q = torch.tensor([True, False, False, True]), q.requires_grad_()
    some = kl_rows(p, q, batch_of(p), task, counted=counted)
    torch.testing.assert_close(some, kl(p[counted], q[counted], task))
    (gradient,) = torch.autograd.grad(some, q)
    assert not gradient[~counted].any() and gradient[counted].all()
    assert float(kl_rows(p, q.detach(), batch_of(p), task, counted=torch.zeros(4))) == 0


def test_rows_of_tokens_that_do_not_count_add_nothing() -> None:
    batch = make_batch(4, kind="tokens")
    p, q = (torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    alone = [kl_rows(p, q, batch, counted=torch.arange(4) == row) for row in range(4)]
    torch.testing.assert_close(sum(alone), kl_rows(p, q, batch))
    assert len({round(float(value), 6) for value in alone}) == 4
