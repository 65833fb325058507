"""Plain torch to measure the methods against: own forward, own embedding hook, own dropout seed, own descent.

Nothing here goes through the seams, except `match` and the checks at the end, which run both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.seams import Batch, Context, Out, View, mix
from hybridengine.testing import Bench, SimpleTask, make_batch, set_up, tiny_bert

EXACT = 1e-11  # fp64 has 2e-16 per operation; some thousand operations and three steps stay far below
LR = 0.2


def bert(dropout: float = 0.1, **config: Any) -> Any:
    """A tiny fp64 classifier of three classes; the same weights each time."""
    return tiny_bert(num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **config).double()


def key(step: int, micro: int = 0) -> int:
    """The dropout seed of a work, as the engine promises it."""
    return mix(0, step, micro)


class Plain:
    """A BERT classifier without the engine."""

    def __init__(self, model: Any) -> None:
        self.model = model.train()
        self.embedding = model.bert.embeddings.word_embeddings
        self.parameters = dict(model.named_parameters())

    def logits(self, batch: Batch, seed: int, delta: Tensor | None = None) -> Tensor:
        handle = self.embedding.register_forward_hook(lambda m, a, out: out if delta is None else out + delta)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.model(**batch.inputs).logits
        finally:
            handle.remove()

    def loss(self, batch: Batch, seed: int, delta: Tensor | None = None) -> Tensor:
        return functional.cross_entropy(self.logits(batch, seed, delta), batch.targets)

    def zeros(self, batch: Batch) -> Tensor:
        shape = (*batch.inputs["input_ids"].shape, self.embedding.weight.shape[1])
        return torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        return {k: g for k, g in zip(self.parameters, grads, strict=True) if g is not None}

    def descend(self, gradient: dict[str, Tensor], lr: float = LR) -> None:
        with torch.no_grad():
            for name, g in gradient.items():
                self.parameters[name] -= lr * g


def unit(x: Tensor) -> Tensor:
    """Each sequence divided by its L2 norm."""
    return x / x.flatten(1).norm(dim=1).view(-1, 1, 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of KL(softmax p || softmax q), from the definition."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative distance of two sets of tensors."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k] - b[k]).double().square().sum()) for k in a)
    return (difference / sum(float(x.double().square().sum()) for x in b.values())) ** 0.5


Reference = Callable[[Plain, Batch, int], dict[str, Tensor]]


def match(method: object, reference: Reference, *, dropout: float = 0.1, steps: int = 3, **options: Any) -> Bench:
    """Three steps of the engine and of the reference, on other batches each: the same parameters."""
    batches = [make_batch(seed=s) for s in range(steps)]
    bench = set_up([method], bert(dropout), batches[0], lr=LR, **options)
    start = bench.parameters()
    plain = Plain(bert(dropout))
    for step, batch in enumerate(batches):
        bench.step([batch])
        plain.descend(reference(plain, batch, key(step)))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step
    assert apart(bench.parameters(), start) > 1e-3
    return bench


class Spy(SimpleTask):
    """A task that keeps the delta and the key of every evaluation."""

    def __init__(self, unit: str = "rows") -> None:
        super().__init__(unit)
        self.deltas: list[dict[str, Tensor]] = []
        self.keys: list[int | None] = []

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        self.deltas.append({site: d.detach().clone() for site, d in view.delta.items()})
        self.keys.append(view.key)
        return super().loss(ctx, batch, view)


def unlabelled_parts(size: int = 4, length: int = 7) -> dict[str, Batch]:
    """Unlabelled rows and their rewritten versions."""
    made = {
        "unlabelled": make_batch(size, length, seed=5, first_row=100),
        "augmented": make_batch(size, length, seed=6, first_row=200),
    }
    return {name: replace(part, targets=None) for name, part in made.items()}


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch, padding cropped to the longest of them, counts and unlabelled part likewise."""
    length = int(batch.inputs["attention_mask"][start:stop].sum(1).max())

    def cut(x: Tensor) -> Tensor:
        return x[start:stop] if x.dim() == 1 else x[start:stop, :length]

    targets = None if batch.targets is None else cut(batch.targets)
    parts = {name: rows_of(part, start, stop) for name, part in batch.parts.items()}
    others = parts["unlabelled"].size if "unlabelled" in parts else 0
    counts = {"rows": stop - start, "all_rows": stop - start + others, "unlabelled_rows": others, "episodes": 1}
    counts["tokens"] = 0 if targets is None else int((targets != -100).sum())
    return replace(
        batch,
        inputs={k: cut(x) for k, x in batch.inputs.items()},
        targets=targets,
        rows=batch.rows[start:stop],
        masks={kind: {k: cut(x) for k, x in entry.items()} for kind, entry in batch.masks.items()},
        counts=counts,
        parts=parts,
    )


def padded(batch: Batch, extra: int) -> Batch:
    """The batch with `extra` more columns of right padding."""

    def wide(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else functional.pad(x, (0, extra))

    return replace(
        batch,
        inputs={k: wide(x) for k, x in batch.inputs.items()},
        masks={kind: {k: wide(x) for k, x in entry.items()} for kind, entry in batch.masks.items()},
        parts={name: padded(part, extra) for name, part in batch.parts.items()},
    )


# ---- what every method must keep -----------------------------------------------------------------------------------

Stack = Callable[[], Sequence[object]]


def gradients(stack: Stack, batches: Sequence[Batch], model: Any, **options: Any) -> dict[str, Tensor]:
    return set_up(stack(), model, batches[0], **options).gradients(batches)


def check_accumulation(stack: Stack, **options: Any) -> None:
    """1 x 8 = 4 x 2 = 8 x 1 with dropout 0."""
    whole = make_batch(8, 9, seed=1, parts=unlabelled_parts(8, 9))
    whole = rows_of(whole, 0, 8)
    one = gradients(stack, [whole], bert(0.0), **options)
    for size in (2, 1):
        split = [rows_of(whole, i, i + size) for i in range(0, 8, size)]
        assert apart(gradients(stack, split, bert(0.0), **options), one) < EXACT


def check_padding(stack: Stack, **options: Any) -> None:
    """More padding changes nothing."""
    batch = make_batch(parts=unlabelled_parts())
    narrow = gradients(stack, [batch], bert(0.0), **options)
    assert apart(gradients(stack, [padded(batch, 4)], bert(0.0), **options), narrow) < EXACT


def check_loss_scale(stack: Stack, **options: Any) -> None:
    """A loss scale of 1024 changes nothing (a power of two, so scaling itself rounds nothing)."""
    plain = gradients(stack, [make_batch()], bert(), **options)
    assert apart(gradients(stack, [make_batch()], bert(), loss_scale=1024.0, **options), plain) < EXACT


def check_restores(stack: Stack, forwards: int, **options: Any) -> None:
    """At lr 0 the weights keep their bits, also when any one of the step's forwards raises."""
    batch = make_batch()
    for failing in (*range(forwards), None):
        bench = set_up(stack(), bert(), batch, **options)
        before = bench.parameters()
        calls = iter(range(10**6))

        def strike(*_: object, calls: Any = calls, failing: int | None = failing) -> None:
            if next(calls) == failing:
                raise RuntimeError("struck")

        bench.run.model.register_forward_pre_hook(strike)
        if failing is None:
            bench.step([batch])
            assert next(calls) == forwards
        else:
            with pytest.raises(RuntimeError, match="struck"):
                bench.step([batch])
        after = bench.parameters()
        assert all(torch.equal(before[k], after[k]) for k in before), failing
