"""Lazy logits: what stays lazy, what computes them, and real models whose head returns them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels.lazy_logits.head import Head


def make(*shape: int, bias: bool = True) -> tuple[Tensor, nn.Linear, list[int]]:
    """States, a head of 7 classes, and how often logits were computed."""
    torch.manual_seed(0)
    return torch.randn(*shape, 4, requires_grad=True), nn.Linear(4, 7, bias=bias), []


def lazy(x: Tensor, head: nn.Linear, reads: list[int]) -> kernels.LazyLogits:
    return kernels.LazyLogits(Head(x, head.weight, head.bias, x.dtype, x.dtype, on_read=lambda: reads.append(1)))


INDEX = torch.tensor([1, 0, 1])
STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.view(-1, 7),
    "view with the classes as the rest": lambda y: y.view(6, -1),
    "reshape": lambda y: torch.reshape(y, (3, 2, 7)),
    "flatten": lambda y: y.flatten(0, 1),
    "shifted": lambda y: y[..., :-1, :].contiguous(),
    "rows": lambda y: y[1:],
    "one row": lambda y: y[0],
    "by index": lambda y: y[INDEX],
    "positions": lambda y: y[torch.arange(2)[:, None], INDEX[None].expand(2, -1)],
    "by mask": lambda y: y[torch.tensor([[True, False, True], [False, True, False]])],
    "new axis": lambda y: y[None],
    "float": lambda y: y.float(),
    "double": lambda y: y.double(),
    "to": lambda y: y.to(torch.float64).to("cpu"),
    "softcap": lambda y: torch.tanh(y / 3.0) * 3.0,
    "scaled": lambda y: 0.5 * y,
    "biased": lambda y: y + torch.arange(7.0),
    "chunk": lambda y: y.chunk(2)[1],
}
COMPUTE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),
    "softmax": lambda y: y.log_softmax(-1),
    "argmax": lambda y: y.argmax(-1),
    "transposed": lambda y: y.transpose(1, 2),
    "view that splits classes": lambda y: y.view(-1),
    "some classes by slice": lambda y: y[..., :3],
    "mask over classes": lambda y: y[:, :, torch.tensor([True, False, True, False, False, False, True])],
    "plus another tensor": lambda y: y + torch.ones(2, 3, 7),
    "times a tensor": lambda y: y * torch.ones(7),
    "scaled, then biased": lambda y: 2 * y + torch.arange(7.0),
    "a softcap of a softcap": lambda y: torch.tanh(torch.tanh(y / 3.0) * 3.0),
    "torch.cat": lambda y: torch.cat([y, y]),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays_lazy_has_the_right_shape_and_values(name: str) -> None:
    x, head, reads = make(2, 3)
    result = STAY[name](lazy(x, head, reads))
    assert isinstance(result, kernels.LazyLogits) and not reads
    expected = STAY[name](head(x))
    assert result.shape == expected.shape and result.dtype == expected.dtype
    torch.testing.assert_close(result.whole(), expected)
    assert reads == [1]


@pytest.mark.parametrize("name", COMPUTE)
def test_everything_else_computes_them_with_their_graph(name: str) -> None:
    x, head, reads = make(2, 3)
    result, expected = COMPUTE[name](lazy(x, head, reads)), COMPUTE[name](head(x))
    assert type(result) is Tensor and reads
    torch.testing.assert_close(result, expected)
    if expected.is_floating_point():
        got, right = (torch.autograd.grad(one.square().sum(), (x, head.weight)) for one in (result, expected))
        torch.testing.assert_close(got, right)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    pieces=st.lists(st.sampled_from(["colon", "int", "slice", "index", "ellipsis", "none", "mask"]), max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_index_gives_what_torch_gives(shape: list[int], pieces: list[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, head, reads = make(*shape)
    sizes = iter([*shape, 7])
    index: list[Any] = []
    for piece in pieces:
        if piece == "ellipsis":
            index.append(...)
        elif piece == "none":
            index.append(None)
        else:
            size = next(sizes, 1)
            index.append(
                {
                    "colon": slice(None),
                    "int": size - 1,
                    "slice": slice(0, max(size - 1, 1)),
                    "index": torch.randint(0, size, (2,), generator=generator),
                    "mask": torch.ones(size, dtype=torch.bool),
                }[piece]
            )
    outcomes = []
    for logits in (lazy(x, head, reads), head(x)):
        try:
            outcomes.append(logits[tuple(index)])
        except (IndexError, RuntimeError) as error:
            outcomes.append(type(error))
    got, expected = outcomes
    if isinstance(expected, type):
        assert got is expected
    else:
        assert not isinstance(got, type) and got.shape == expected.shape
        torch.testing.assert_close(got.whole() if isinstance(got, kernels.LazyLogits) else got, expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: F.cross_entropy(y.view(-1, 7), t.view(-1), ignore_index=2, label_smoothing=0.1),
        lambda y, t: nn.CrossEntropyLoss(weight=torch.arange(1.0, 8.0))(y.flatten(0, 1), t.flatten()),
        lambda y, t: kernels.cross_entropy(y.flatten(0, 1), t.flatten(), reduction="sum", z_loss=0.1),
        lambda y, t: F.cross_entropy((torch.tanh(y / 3) * 3).float().view(-1, 7), t.view(-1), reduction="none").sum(),
    ],
)
def test_a_cross_entropy_computes_no_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, head, reads = make(2, 3)
    target = torch.randint(0, 7, (2, 3))
    got, expected = loss(lazy(x, head, reads), target), loss(head(x), target)
    torch.testing.assert_close(got, expected)
    assert not reads
    parameters = (x, head.weight, head.bias)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))


def test_classes_by_number_are_rows_of_the_head() -> None:
    x, head, reads = make(2, 3)
    words = torch.tensor([5, 0, 5])
    got, expected = lazy(x, head, reads)[..., words], head(x)[..., words]
    torch.testing.assert_close(got, expected)
    assert not reads
    got.sum().backward()
    assert head.weight.grad is not None
    ours, head.weight.grad = head.weight.grad.clone(), None
    head(x)[..., words].sum().backward()
    torch.testing.assert_close(ours, head.weight.grad)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_label_rows_equal_the_whole_head_there(rows: list[int], bias: bool, dtype: torch.dtype) -> None:
    x, head = torch.randn(2, 3, 4, dtype=dtype), nn.Linear(4, 7, bias=bias).to(dtype)
    index = torch.tensor(rows)
    leaf = x.clone().requires_grad_()
    got = kernels.label_row_head(leaf, head.weight, index, bias=head.bias)
    expected = (x.double() @ head.weight.double().t() + (head.bias.double() if bias else 0))[..., index]
    eps = torch.finfo(dtype).eps  # of sums of five terms
    assert float((got - expected).detach().abs().max()) <= 5 * eps * 5 * float(expected.detach().abs().max() + 1)
    (gradient,) = torch.autograd.grad(got.square().sum(), head.weight)
    assert not bool(gradient[[one for one in range(7) if one not in rows]].any())
    for wrong in ((x, head.weight[:, :3], index), (x, head.weight, index[None])):
        with pytest.raises(ValueError, match="expected x"):
            kernels.label_row_head(*wrong)


class Squared(torch.autograd.Function):
    """Somebody's loss: computed where no graph is recorded."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return 2 * logits * gradient


@pytest.mark.parametrize("change", [lambda y: y, lambda y: torch.tanh(y[:, 1:] / 2) * 2])
def test_a_foreign_autograd_function_gets_its_gradient_through(change: Callable[[Tensor], Tensor]) -> None:
    x, head, reads = make(2, 3)
    parameters = (x, head.weight, head.bias)
    logits = change(lazy(x, head, reads))
    assert logits.requires_grad and logits.grad_fn is not None and not reads
    apply: Any = Squared.apply
    got = torch.autograd.grad(apply(logits), parameters)
    torch.testing.assert_close(got, torch.autograd.grad(change(head(x)).square().sum(), parameters))
    head.weight.requires_grad_(False)
    assert torch.autograd.grad(apply(lazy(x, head, reads)), x)[0].shape == x.shape


def test_what_is_changed_in_place_is_seen_or_refused() -> None:
    x, head, reads = make(2, 3)
    target = torch.randint(0, 7, (6,))
    logits, plain = lazy(x, head, reads), head(x)
    for one in (logits, plain):
        one[..., 3] = -1e9
        one.div_(2.0)
    got, expected = (F.cross_entropy(one.view(-1, 7), target) for one in (logits, plain))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))
    logits = lazy(x, head, reads)
    view = logits.view(-1, 7)
    with pytest.raises(RuntimeError, match="in place after others were made"):
        logits.masked_fill_(torch.zeros(2, 3, 7, dtype=torch.bool), 0.0)
    assert view.shape == (6, 7)


def test_a_changed_head_is_noticed() -> None:
    x, head, reads = make(2, 3)
    logits, other = lazy(x, head, reads), lazy(x, head, reads)
    read = other.sum()
    with torch.no_grad():
        head.weight.mul_(0.5)
    for use in (torch.sum, lambda y: y[0], lambda y: F.cross_entropy(y.view(-1, 7), torch.zeros(6, dtype=torch.int64))):
        with pytest.raises(RuntimeError, match="before the optimizer's step"):
            use(logits)
    torch.testing.assert_close(other.sum(), read)  # read in time


def test_without_a_graph_and_in_transforms_they_are_ordinary() -> None:
    x, head, reads = make(2, 3)
    with kernels.patch(head):
        with torch.no_grad():
            assert type(head(x)) is Tensor
        with torch.inference_mode():
            assert type(head(x)) is Tensor
        torch.func.grad(lambda x: head(x).square().sum())(x)
        torch.func.jvp(lambda x: head(x), (x,), (x,))
        checkpointed = torch.utils.checkpoint.checkpoint(head, x, use_reentrant=True)
        checkpointed.sum().backward()
    assert x.grad is not None and not reads


def test_copies_and_replicas_are_not_patched_and_contexts_nest() -> None:
    x, head, reads = make(2, 3)
    with kernels.patch(head):
        copied = copy.deepcopy(head)
        assert type(copied(x)) is Tensor
        with kernels.patch(head, on_read=lambda: reads.append(1)):
            head(x).sum()
        assert reads == [1] and isinstance(head(x), kernels.LazyLogits)
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(type(head(x))))
        thread.start()
        thread.join()
        assert seen == [Tensor]
    assert type(head) is nn.Linear
    torch.testing.assert_close(copied(x), head(x))


def test_tied_embeddings_are_not_counted_twice() -> None:
    """x depends on the head itself; a foreign function's gradient comes through the place in the graph."""
    torch.manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 5, 5])
    apply: Any = Squared.apply
    results = []
    for wrap in (lambda x, w: kernels.LazyLogits(Head(x, w, None, x.dtype, x.dtype)), lambda x, w: x @ w.t()):
        states = torch.tanh(weight[ids])
        loss = apply(wrap(states, weight)) + states.sum()
        results.append(torch.autograd.grad(loss, weight, create_graph=True)[0])
    torch.testing.assert_close(*results)


def test_torchs_other_spellings_are_left_to_torch() -> None:
    x, head, reads = make(2, 3)
    bias, plain = torch.arange(7.0), head(x)
    for use in (
        lambda y: torch.add(y, bias, alpha=2),
        lambda y: torch.div(y, 2.0, rounding_mode="floor"),
        lambda y: torch.mul(input=y, other=2.0),
        lambda y: torch.flatten(input=y),
        lambda y: y[..., torch.tensor([-1, 0])],
        lambda y: y[[0, 1]],
        lambda y: (y * 10).to(torch.int64),
        lambda y: (y / 100).half(),
        lambda y: torch.tanh(y) * -1.0,
        lambda y: y + bias.double(),
    ):
        got, expected = use(lazy(x, head, reads)), use(plain)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got.whole() if isinstance(got, kernels.LazyLogits) else got, expected)


def test_our_other_losses_take_them_computed() -> None:
    x, head, reads = make(6)
    other = torch.randn(6, 7)
    got = kernels.kl_pair(lazy(x, head, reads), other)
    torch.testing.assert_close(got, kernels.kl_pair(head(x), other))
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(kernels.kl_pair(head(x), other), x))


def test_read_once_and_again_with_a_graph() -> None:
    x, head, reads = make(2, 3)
    logits = lazy(x, head, reads)
    with torch.no_grad():
        assert not logits.argmax(-1).requires_grad
    assert logits.sum().requires_grad and logits.whole() is logits.whole()
    assert len(reads) == 1
    assert not logits.detach().requires_grad
    assert not lazy(x, head, reads).detach().whole().requires_grad
    assert "LazyLogits" in repr(logits)


def test_under_autocast_they_are_what_the_head_would_have_given() -> None:
    x, head, _ = make(2, 3)
    with torch.autocast("cpu", torch.bfloat16), kernels.patch(head):
        logits, parts, words = head(x), head(x)[:, 1:].float(), head(x)[..., torch.tensor([0, 5])]
        assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected = head(x)
        labels = torch.tensor([0, 5])
        picked, rows = expected[:, 1:].float(), expected[..., labels]
    assert torch.equal(logits.whole(), expected)
    assert torch.equal(parts.whole(), picked)
    assert torch.equal(words, rows)


def test_patch_gives_the_head_back_and_says_why_it_cannot() -> None:
    x, head, reads = make(2, 3)
    with pytest.raises(ZeroDivisionError), kernels.patch(head, on_read=lambda: reads.append(1)):
        head(x).sum()
        1 / 0  # noqa: B018
    assert type(head(x)) is Tensor and "forward" not in vars(head) and reads == [1]
    handle = head.register_forward_hook(lambda *_: None)
    with pytest.raises(KernelUnavailable, match="watches the head with hooks"), kernels.patch(head):
        pass
    handle.remove()
    model = nn.Module()
    for found, reason in ((None, "no output embeddings"), (nn.Bilinear(2, 2, 2), "not a plain Linear")):
        model.get_output_embeddings = lambda found=found: found  # type: ignore[assignment]
        with pytest.raises(KernelUnavailable, match=reason), kernels.patch(model):
            pass


def language_models() -> dict[str, Any]:
    import transformers as t

    small = {"vocab_size": 4000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    few = {**small, "num_attention_heads": 4}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**few)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**few, num_key_value_heads=4, head_dim=8)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=4000, n_embd=32, n_layer=2, n_head=4)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**few)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**few)),
        "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**few, embedding_size=16)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=4000, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0
            )
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(
                vocab_size=4000, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            )
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "roberta", "electra", "t5", "bart"])
def test_a_patched_model_has_the_same_loss_and_gradients_and_makes_no_logits(name: str) -> None:
    torch.manual_seed(1)
    # Gemma's loss casts its capped logits to float32: from float64 that loses something, so they would be computed.
    model = language_models()[name]().to(torch.float32 if name == "gemma2" else torch.float64).eval()
    ids = torch.randint(5, 3990, (4, 70))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    results = []
    reads: list[int] = []
    for patched in (False, True):
        model.zero_grad()
        if patched:
            before = kernels.used()
            with kernels.patch(model, on_read=lambda: reads.append(1)):
                output = model(input_ids=ids, labels=labels)
            assert kernels.used(before).keys() == {"linear_cross_entropy"}
        else:
            output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        results.append((output.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert not reads
    near = {"rtol": 1e-3, "atol": 1e-6} if name == "gemma2" else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(results[1], results[0], **near)
    assert isinstance(output.logits, kernels.LazyLogits)
    with torch.no_grad():
        torch.testing.assert_close(output.logits.argmax(-1), model(input_ids=ids, labels=labels).logits.argmax(-1))
