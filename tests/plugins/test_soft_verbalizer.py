"""Learned class vectors against a reference written from the paper, and where they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import EXACT, LR, apart, key
from prompted import MORE_ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from torch import Tensor
from torch.nn import functional

from hybridengine import Engine
from hybridengine.errors import ConfigError, ModelError
from hybridengine.plugin import ParamGroup
from hybridengine.seams import View
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.prompts.soft_verbalizer import SoftVerbalizer
from hybridengine_plugins.prompts.template import Template


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


def reference(model: Any, batch: Any, mask_id: int, vectors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """WARP, section 3: the class whose vector is nearest, by inner product, to the MLM head's state at the mask."""
    parameters = {k: p for k, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = model.bert(**batch.inputs).last_hidden_state
        states = model.cls.predictions.transform(hidden)
    at = (batch.inputs["input_ids"] == mask_id).nonzero()
    logits = states[at[:, 0], at[:, 1]] @ vectors["weight"].T + vectors["bias"]
    loss = functional.cross_entropy(logits, batch.targets)
    names = [*parameters, *vectors]
    found = torch.autograd.grad(loss, [*parameters.values(), *vectors.values()], allow_unused=True)
    return {k: g for k, g in zip(names, found, strict=True) if g is not None}


def test_three_steps_match_the_paper(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER), folders["dropout"], SoftVerbalizer(), rows=MORE_ROWS, lr=LR)
    plain = Ready(Template(VERBALIZER), folders["dropout"], rows=MORE_ROWS)
    model, tokenizer = plain.base.train(), plain.run.tokenizer
    decoder = model.cls.predictions.decoder
    chosen = tokenizer.convert_tokens_to_ids([VERBALIZER[label] for label in plain.run.labels])
    vectors = {"weight": decoder.weight[chosen], "bias": decoder.bias[chosen]}
    vectors = {k: v.detach().clone().requires_grad_() for k, v in vectors.items()}
    start = ready.bench.parameters()
    for step in range(3):
        batch = ready.collate(range(3 * step, 3 * step + 3))
        ready.bench.step([batch])
        gradient = reference(model, batch, tokenizer.mask_token_id, vectors, key(step))
        with torch.no_grad():
            for name, g in gradient.items():
                (vectors[name] if name in vectors else model.get_parameter(name)).sub_(LR * g)
        ours = ready.bench.parameters()
        theirs = {f"soft-verbalizer/{k}": v.detach() for k, v in vectors.items()}
        theirs |= {k: p.detach() for k, p in model.named_parameters()}
        assert apart(ours, theirs) < EXACT, step
    assert apart(ours, start) > 1e-3
    assert ready.bench.effect("soft-verbalizer", "moved") > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_training_starts_at_the_words_own_logits(folders: dict[str, Path], name: str, side: str) -> None:
    """The head's own rows, cut out: softmax over classes is that of the template."""
    soft = Ready(Template(VERBALIZER), folders[name], SoftVerbalizer(), side=side).logits()
    words = Ready(Template(VERBALIZER), folders[name], side=side).logits()
    torch.testing.assert_close(soft.log_softmax(-1), words.log_softmax(-1), rtol=1e-10, atol=1e-10)


def test_several_words_start_at_their_mean(folders: dict[str, Path]) -> None:
    words = {"bad": ["terrible", "qx"], "good": ["great", "good"], "mixed": "fine"}
    ready = Ready(Template(words), folders["bert"], SoftVerbalizer())
    tokenizer, decoder = ready.run.tokenizer, ready.base.cls.predictions.decoder

    def row(word: str) -> Tensor:
        return decoder.weight[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)

    expected = torch.stack([(row("terrible") + row("qx")) / 2, (row("great") + row("good")) / 2, row("fine")])
    torch.testing.assert_close(ready.run.module("soft-verbalizer").weight, expected, rtol=1e-12, atol=1e-12)


def test_without_words_the_seed_alone_decides(folders: dict[str, Path]) -> None:
    def drawn(seed: int) -> Tensor:
        torch.randn(seed + 3)
        run = Ready(Template(), folders["bert"], SoftVerbalizer(), seed=seed).run
        return run.module("soft-verbalizer").weight.detach()

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    rows = Ready(Template(), folders["bert"]).base.cls.predictions.decoder.weight.detach()
    spread = (drawn(0) - rows.mean(0)) / rows.std(0)
    # 96 normal numbers: their standard deviation has a standard error of 1 / sqrt(2 * 96)
    assert abs(float(spread.std()) - 1) < 4 / (2 * 96) ** 0.5


def test_relabelling_classes_permutes_logits(folders: dict[str, Path]) -> None:
    first = Ready(Template(VERBALIZER), folders["bert"], SoftVerbalizer()).logits()
    turned = {"bad": "great", "good": "fine", "mixed": "terrible"}
    second = Ready(Template(turned), folders["bert"], SoftVerbalizer()).logits()
    torch.testing.assert_close(first[:, [1, 2, 0]], second, rtol=1e-12, atol=1e-12)


def test_splits_and_loss_scale_change_nothing(folders: dict[str, Path]) -> None:
    def gradients(sizes: list[list[int]], **options: Any) -> dict[str, Tensor]:
        ready = Ready(Template(VERBALIZER), folders["bert"], SoftVerbalizer(), rows=MORE_ROWS, **options)
        return ready.bench.gradients([ready.collate(part) for part in sizes])

    whole = gradients([list(range(8))])
    assert {"soft-verbalizer/weight", "soft-verbalizer/bias"} < whole.keys()
    assert apart(gradients([[0, 1], [2, 3], [4, 5], [6, 7]]), whole) < EXACT
    assert apart(gradients([[i] for i in range(8)]), whole) < EXACT
    assert apart(gradients([list(range(8))], loss_scale=1024.0), whole) < EXACT


def test_the_vocabulary_is_spared(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER), folders["bert"], SoftVerbalizer())
    seen: list[tuple[int, ...]] = []
    ready.base.cls.predictions.decoder.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    ready.bench.step([ready.batch])
    assert ready.bench.ctx.trace.text() == "F4 B S"
    assert seen == [(4, 1, len(ready.run.tokenizer))]


def test_functional_vectors_are_read(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER), folders["bert"], SoftVerbalizer())
    ready.run.model.eval()
    own = ready.run.module("soft-verbalizer").weight
    view = View().with_params({"soft-verbalizer/weight": torch.zeros_like(own)})
    logits = ready.bench.ctx.outputs(ready.batch, [view])[0].logits
    bias = ready.run.module("soft-verbalizer").bias
    torch.testing.assert_close(logits, bias.expand(4, -1))


def test_the_vectors_learn_at_their_own_rate(folders: dict[str, Path]) -> None:
    method = SoftVerbalizer(ratio=4.0)
    run = Ready(Template(VERBALIZER), folders["bert"], method).run
    run.config.train.lr = 0.25
    groups = method.transform_param_groups(run, [ParamGroup(dict(run.may_optimise))])
    rates = {name: group.options.get("lr", 0.25) for group in groups for name in group.parameters}
    assert sorted(rates) == sorted(run.may_optimise)
    assert all(rate == (1.0 if name.startswith("soft-verbalizer/") else 0.25) for name, rate in rates.items())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_learns_beside_lora(folders: dict[str, Path], name: str) -> None:
    ready = Ready(Template(), folders[name], LoRA(r=4), SoftVerbalizer(), fp64=False)
    ready.run.optimizer = torch.optim.Adam(list(ready.run.may_optimise.values()), lr=2e-2)
    for _ in range(30):
        ready.run.model.train()
        ready.bench.step([ready.batch])
    assert ready.logits().argmax(-1).tolist() == ready.batch.targets.tolist()


def test_a_model_with_an_unreadable_head_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.BertForMaskedLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(ModelError, match="no output layer whose input could be read"):
        Ready(Template(VERBALIZER), folders["bert"], SoftVerbalizer())


def test_one_verbalizer_at_a_time(folders: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(folders["bert"], ["template", "verbalizer", "soft-verbalizer"], tmp_path / "run")
    with pytest.raises(ConfigError, match="both take the place 'verbalizer'"):
        Engine(config).validate()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_finished_run_predicts_with_its_vectors(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    methods: list[Any] = [{"template": {"verbalizer": VERBALIZER}}, "soft-verbalizer"]
    engine = Engine(run_config(folders[name], methods, tmp_path / "run", lr=1e-2))
    engine.train()
    model = loaded_as_it_said(tmp_path / "run")
    trained = engine._run.module("soft-verbalizer").weight
    assert torch.equal(model.run.module("soft-verbalizer").weight, trained)
