"""Embedding sites: where a delta may be added, and that it arrives exactly once or not silently."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridengine.errors import SeamError
from hybridengine.seams import Sites, View
from hybridengine.testing import (
    Bench,
    SimpleTask,
    make_batch,
    set_up,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

WORDS = "bert.embeddings.word_embeddings"
BERT = {"num_labels": 3}


def bench_of(model: Any = None, kind: str = "rows") -> Bench:
    task = SimpleTask("rows" if kind == "rows" else "tokens")
    return set_up([], model or tiny_bert(**BERT).double(), make_batch(kind=kind), task=task)


def logits(bench: Bench, view: View, kind: str = "rows") -> Tensor:
    return bench.ctx.outputs(make_batch(kind=kind), [view])[0].scores


@pytest.mark.parametrize(
    ("model", "kind", "wanted"),
    [
        (tiny_bert, "rows", {WORDS: "input_ids"}),  # positions and token types are embeddings too, and no sites
        (tiny_gpt2, "rows", {"transformer.wte": "input_ids"}),
        (tiny_llama, "rows", {"model.embed_tokens": "input_ids"}),
        (tiny_t5, "seq2seq", {"shared": "input_ids", "shared#1": "decoder_input_ids"}),  # one module, two calls
    ],
)
def test_sites_are_the_calls_on_token_ids(model: Any, kind: str, wanted: dict[str, str]) -> None:
    bench = bench_of(model(), kind)
    found = {name: site.input for name, site in bench.ctx.sites.table.items()}
    if kind == "seq2seq":  # T5 names its tables encoder.embed_tokens and decoder.embed_tokens, tied to `shared`
        assert sorted(found.values()) == ["decoder_input_ids", "input_ids"]
    else:
        assert found == wanted
    assert all(site.width == 32 for site in bench.ctx.sites.table.values())


def test_zeros_have_the_shape_and_dtype_of_each_site() -> None:
    batch = make_batch(kind="seq2seq")
    for name, zero in bench_of(tiny_t5().double(), "seq2seq").ctx.zeros(batch).items():
        site = bench_of(tiny_t5().double(), "seq2seq").ctx.sites.table[name]
        assert zero.shape == (*batch.inputs[site.input].shape, 32)
        assert zero.dtype == torch.float64
        assert not zero.any()


@pytest.mark.parametrize(("model", "kind"), [(lambda: tiny_bert(**BERT), "rows"), (tiny_t5, "seq2seq")])
def test_a_zero_delta_leaves_the_logits_bit_equal(model: Any, kind: str) -> None:
    bench = bench_of(model(), kind)
    zero = bench.ctx.zeros(make_batch(kind=kind))
    assert torch.equal(logits(bench, View(), kind), logits(bench, View().plus(zero), kind))


def test_a_delta_is_added_to_the_embedding_output() -> None:
    bench, batch = bench_of(), make_batch()
    zero = bench.ctx.zeros(batch)[WORDS]
    delta = torch.randn(zero.shape, generator=torch.Generator().manual_seed(0), dtype=zero.dtype)
    through_site = logits(bench, View().plus({WORDS: delta}))
    plain = tiny_bert(**BERT).double()
    plain.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, out: out + delta)
    torch.testing.assert_close(through_site, plain(**batch.inputs).logits)


def test_each_site_of_an_encoder_decoder_gets_its_own_delta() -> None:
    bench, batch = bench_of(tiny_t5().double(), "seq2seq"), make_batch(kind="seq2seq")
    zero = bench.ctx.zeros(batch)
    changed = []
    for site in zero:
        moved = logits(bench, View().plus({site: torch.ones_like(zero[site])}), "seq2seq")
        changed.append(moved)
        assert not torch.equal(moved, logits(bench, View(), "seq2seq"))
    assert not torch.equal(*changed)


def test_a_delta_of_the_wrong_shape_is_refused() -> None:
    bench = bench_of()
    with pytest.raises(SeamError, match=r"delta has shape \(1, 7, 32\), output \(4, 7, 32\)"):
        logits(bench, View().plus({WORDS: torch.zeros(1, 7, 32)}))  # it would broadcast silently


def test_a_delta_that_no_site_consumes_is_refused_with_the_sites() -> None:
    bench = bench_of()
    with pytest.raises(SeamError, match=r"sites \['nowhere'\].*consumed \[\].*word_embeddings"):
        logits(bench, View().plus({"nowhere": torch.zeros(4, 7, 32)}))


class Twice(nn.Module):
    """Calls its embedding once, or twice from the second forward on, as generation does."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 32)
        self.calls = 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = sum(self.words(input_ids) for _ in range(self.calls))
        return SimpleNamespace(logits=hidden.mean(1)[:, :3])


def test_a_site_called_more_often_than_it_was_found_is_refused() -> None:
    model = Twice()
    bench = bench_of(model)
    delta = bench.ctx.zeros(make_batch())
    logits(bench, View().plus(delta))
    model.calls = 2
    logits(bench, View())  # without a delta any number of calls is fine
    with pytest.raises(SeamError, match="ran again inside one forward"):
        logits(bench, View().plus(delta))


def test_a_failed_forward_leaves_no_delta_behind() -> None:
    bench = bench_of()
    clean = logits(bench, View())
    with pytest.raises(SeamError):
        logits(bench, View().plus({WORDS: torch.zeros(1, 7, 32)}))
    assert torch.equal(logits(bench, View()), clean)


def test_a_copied_model_reads_the_same_slot() -> None:
    """A teacher copied from the model must not keep a stale delta of its own."""
    bench, batch = bench_of(), make_batch()
    double = copy.deepcopy(bench.run.model)
    delta = {site: torch.ones_like(z) for site, z in bench.ctx.zeros(batch).items()}
    moved = bench.ctx.outputs(batch, [View().plus(delta)], model=double)[0].scores
    assert torch.equal(moved, logits(bench, View().plus(delta)))
    assert torch.equal(bench.ctx.outputs(batch, [View()], model=double)[0].scores, logits(bench, View()))


def test_a_forward_put_on_the_embedding_itself_is_seen() -> None:
    """As accelerate does for offloaded and quantised models; it comes before the forward of the class."""
    model = tiny_bert(**BERT).double()
    words = model.bert.embeddings.word_embeddings
    own = words.forward
    words.forward = lambda ids: 2 * own(ids)
    bench, batch = bench_of(model), make_batch()
    delta = {site: torch.ones_like(z) for site, z in bench.ctx.zeros(batch).items()}
    moved = logits(bench, View().plus(delta))
    plain = tiny_bert(**BERT).double()
    plain.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, out: 2 * out + 1)
    torch.testing.assert_close(moved, plain(**batch.inputs).logits)


def test_a_model_without_token_embeddings_says_so() -> None:
    bench = set_up([], tiny_bert(**BERT), make_batch())
    bench.run.sites = None
    with pytest.raises(SeamError, match="no embedding of token ids"):
        bench.ctx.zeros(make_batch())


def test_the_gradient_reaches_delta_through_frozen_embeddings() -> None:
    model = tiny_bert(**BERT).double()
    model.bert.embeddings.requires_grad_(False)
    bench, batch = bench_of(model), make_batch()
    leaves = {site: z.requires_grad_() for site, z in bench.ctx.zeros(batch).items()}
    (gradient,) = bench.ctx.grad(logits(bench, View().plus(leaves)).square().sum(), list(leaves.values()))
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_masks_are_those_of_the_sites_input() -> None:
    bench, batch = bench_of(tiny_t5(), "seq2seq"), make_batch(kind="seq2seq")
    for name, site in bench.ctx.sites.table.items():
        assert torch.equal(bench.ctx.mask(batch, name), batch.masks["perturbable"][site.input])


def test_soft_prompts_stand_at_placeholder_ids() -> None:
    """Id -1-i is prompt vector i; the lookup sees a valid row; real tokens keep their embeddings."""
    model = tiny_bert(**BERT).double()
    batch = make_batch(padded=False)
    sites = Sites(model, batch.inputs)
    prompt = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    sites.soft_prompt = lambda: prompt
    seen: list[Tensor] = []
    model.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, out: seen.append(out))
    ids = batch.inputs["input_ids"].clone()
    ids[:, 0], ids[:, 1] = -1, -2
    model(**{**batch.inputs, "input_ids": ids}).logits.sum().backward()
    table = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(seen[0][:, :2], prompt.expand(4, 2, 32))
    assert torch.equal(seen[0][:, 2:], table[ids[:, 2:]])
    assert prompt.grad is not None
    assert prompt.grad.abs().sum() > 0


# ---- reading what stands at a site -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"), [(tiny_bert, "rows"), (tiny_gpt2, "rows"), (tiny_llama, "rows"), (tiny_t5, "seq2seq")]
)
def test_a_delta_of_minus_the_embeddings_blanks_them(model: Any, kind: str) -> None:
    """The forward then sees zeros, as with an empty table; gradients go through the delta as well."""
    bench, batch = bench_of(model().double(), kind), make_batch(kind=kind)
    view = View(key=1).plus({site: torch.randn_like(zero) for site, zero in bench.ctx.zeros(batch).items()})
    found = bench.ctx.embedded(batch, view)
    assert found.keys() == bench.ctx.zeros(batch).keys()
    blank = bench.ctx.embedded(batch, at := view.plus({site: -x for site, x in found.items()}))
    assert all(x.abs().max() < 1e-14 and x.requires_grad for x in blank.values())
    tables = {id(m.weight): m.weight for m in bench.run.model.modules() if isinstance(m, nn.Embedding)}
    read = [w for w in tables.values() if w.shape[0] == bench.run.model.get_input_embeddings().weight.shape[0]]
    for gradient in torch.autograd.grad(sum(x.square().sum() for x in blank.values()), read, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-12
    assert logits(bench, at, kind).isfinite().all()


def test_embeddings_are_those_of_the_parameters_of_the_view() -> None:
    for model, name in ((tiny_bert(**BERT), f"{WORDS}.weight"), (tiny_gpt2(), "transformer.wte.weight")):
        bench, batch = bench_of(model.double()), make_batch()
        other = torch.randn_like(dict(model.named_parameters())[name]).requires_grad_()
        view = View().with_params({name: other})
        (x,) = bench.ctx.embedded(batch, view).values()
        assert torch.equal(x, other[batch.inputs["input_ids"]])
        assert torch.autograd.grad(x.sum(), other)[0].abs().sum() > 0
