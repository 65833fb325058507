"""1 × 8 = 4 × 2 = 8 × 1: any split of a step into micro-batches gives the same gradient, whatever the stack's units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook
from hybridengine.seams import Batch, Context, Out, View
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.adversarial.vat import VAT
from hybridengine_plugins.regularize.rdrop import RDrop

ROWS, UNLABELLED, LENGTH = 8, 8, 9
# The same sums in another order: 1e-6 is some 1e10 roundings in double, 1e-5 some 100 in single precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


@dataclass(eq=False)
class Sequences:
    """A term per row beside the tokens' loss: the squared mean logit of each sequence."""

    traits: ClassVar[Traits] = Traits(order=Band.TERM)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        out = inner(ctx, batch, view)
        real = batch.masks["attention"]["input_ids"].unsqueeze(-1)
        mean = (out.scores * real).sum((1, 2)) / real.sum((1, 2))
        return replace(out, terms={**out.terms, "sequences": (mean.square().sum(), "rows")})


def pick(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, with their own counts."""
    size = len(batch.rows[rows])
    masks = {kind: {k: m[rows] for k, m in named.items()} for kind, named in batch.masks.items()}
    targets = batch.targets[rows]
    counts = {"rows": size, "all_rows": size, "episodes": 1, "tokens": int((targets != -100).sum())}
    return Batch({k: v[rows] for k, v in batch.inputs.items()}, targets, batch.rows[rows], masks, counts)


def split(labelled: Batch, unlabelled: Batch, parts: int) -> list[Batch]:
    """The step's rows in so many micro-batches, each with its share of the unlabelled ones."""
    made = []
    for part in range(parts):
        own = pick(labelled, slice(part * ROWS // parts, (part + 1) * ROWS // parts))
        other = pick(unlabelled, slice(part * UNLABELLED // parts, (part + 1) * UNLABELLED // parts))
        counts = {**own.counts, "all_rows": own.size + other.size}
        made.append(replace(own, parts={"unlabelled": other}, counts=counts))
    tokens = [batch.counts["tokens"] for batch in made]
    assert parts < 4 or max(tokens) > 1.1 * min(tokens)  # else the mean over micro-batches would do
    return made


def gradients(methods: list[object], parts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    model = tiny_bert("AutoModelForTokenClassification", num_labels=3).to(dtype)
    labelled = make_batch(ROWS, LENGTH, kind="tokens")
    unlabelled = make_batch(UNLABELLED, LENGTH, kind="tokens", seed=1, first_row=100)
    options: dict[str, Any] = {"task": SimpleTask("tokens"), "labels": ("a", "b", "c")}
    bench = set_up(methods, model, labelled, **options)
    return bench.gradients(split(labelled, unlabelled, parts))


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖a‖ over all parameters."""
    assert one.keys() == other.keys()
    apart = torch.stack([(one[k] - other[k]).double().norm() for k in one]).norm()
    return float(apart / torch.stack([value.double().norm() for value in one.values()]).norm())


STACKS: dict[str, Callable[[], list[object]]] = {
    "tokens": lambda: [],
    "tokens, sequences, unlabelled": lambda: [Sequences(), VAT()],
    "under an attack": lambda: [Sequences(), VAT(), FGM(epsilon=0.5)],
    "under an attack in moved weights": lambda: [Sequences(), RDrop(), VAT(), FGM(epsilon=0.5), SAM()],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_any_split_of_a_step_gives_the_same_gradient(stack: Callable[[], list[object]], dtype: torch.dtype) -> None:
    whole = gradients(stack(), 1, dtype)
    for parts in (2, 4, 8):
        assert difference(whole, gradients(stack(), parts, dtype)) <= TOLERANCE[dtype], f"{parts} micro-batches"
