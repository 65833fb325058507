"""Templates whose words are trained vectors: they start as the words, and train like embeddings put in by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain import EXACT, LR, apart, key
from prompted import MORE_ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from torch.nn import functional

from hybridengine import Engine
from hybridengine.errors import ConfigError, StackError
from hybridengine_plugins.prompts.calibration import Calibration
from hybridengine_plugins.prompts.prompt_tuning import PromptTuning
from hybridengine_plugins.prompts.soft_template import SoftTemplate
from hybridengine_plugins.prompts.template import Template

TEXT = "{text} it was [MASK] ."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_training_starts_at_the_written_template(folders: dict[str, Path], name: str, side: str) -> None:
    soft = Ready(Template(VERBALIZER, TEXT), folders[name], SoftTemplate(), side=side)
    assert bool((soft.batch.inputs["input_ids"] < 0).any(1).all())
    assert torch.equal(soft.logits(), Ready(Template(VERBALIZER, TEXT), folders[name], side=side).logits())


def test_three_steps_equal_embeddings_put_in_by_hand(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER, TEXT), folders["bert"], SoftTemplate(hard=["."]), rows=MORE_ROWS, lr=LR)
    plain = Ready(Template(VERBALIZER, TEXT), folders["bert"], rows=MORE_ROWS)
    model, tokenizer = plain.base.train(), plain.run.tokenizer
    table = model.get_input_embeddings()
    it_was = tokenizer.convert_tokens_to_ids(["it", "was"])
    vectors = table.weight[it_was].detach().clone().requires_grad_(True)
    chosen = tokenizer.convert_tokens_to_ids([VERBALIZER[label] for label in plain.run.labels])
    start = ready.bench.parameters()
    for step in range(3):
        rows = range(3 * step, 3 * step + 3)
        batch, written = ready.collate(rows), plain.collate(rows).inputs["input_ids"]
        ready.bench.step([batch])
        at = (written == tokenizer.mask_token_id).nonzero()
        embeds = table(written).clone()
        for row, column in at.tolist():
            assert written[row, column - 2 : column].tolist() == it_was
            embeds = embeds.index_put((torch.tensor([row]), torch.tensor([column - 2])), vectors[0])
            embeds = embeds.index_put((torch.tensor([row]), torch.tensor([column - 1])), vectors[1])
        others = {k: v for k, v in batch.inputs.items() if k != "input_ids"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(step))
            logits = model(inputs_embeds=embeds, **others).logits[at[:, 0], at[:, 1]].log_softmax(-1)[:, chosen]
        loss = functional.cross_entropy(logits, batch.targets)
        parameters = [vectors, *model.parameters()]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(parameters, gradient, strict=True):
                if g is not None:
                    p.sub_(LR * g)
        theirs = {k: p.detach() for k, p in model.named_parameters()} | {"soft-template/vectors": vectors.detach()}
        assert apart(ready.bench.parameters(), theirs) < EXACT, step
    assert apart(ready.bench.parameters(), start) > 1e-3


def test_beside_a_soft_prompt_each_has_its_own_vectors(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER, TEXT), folders["bert"], SoftTemplate(), PromptTuning(n=2))
    ids = [ready.run.soft_tokens.ids(name) for name in ("soft-template", "prompt-tuning")]
    assert sorted(ids[0] + ids[1]) == [-5, -4, -3, -2, -1]
    for row in ready.batch.inputs["input_ids"].tolist():
        assert [token for token in row if token < 0] == ids[1] + ids[0]


def test_calibration_reads_content_free_texts_in_the_soft_template(folders: dict[str, Path]) -> None:
    """Else it would divide by what another template says."""
    calibration = Calibration(content=["a good movie"])
    ready = Ready(Template(VERBALIZER, TEXT), folders["bert"], SoftTemplate(), calibration)
    with torch.no_grad():
        ready.run.modules["soft-template"].vectors.normal_()
    scores = ready.predict().scores
    torch.testing.assert_close(scores[0], torch.full_like(scores[0], 1 / 3))  # row 0 is that very text


def test_a_run_trains_saves_and_reloads(folders: dict[str, Path], tmp_path: Path) -> None:
    methods = [{"template": {"verbalizer": VERBALIZER, "text": TEXT}}, "soft-template", {"lora": {"r": 2}}]
    Engine(run_config(folders["bert"], methods, tmp_path / "run")).train()
    loaded_as_it_said(tmp_path / "run")


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hard names 'film', which is no word of the template"):
        Ready(Template(VERBALIZER, TEXT), folders["bert"], SoftTemplate(hard=["film"]))
    with pytest.raises(ConfigError, match="no word that could be trained"):
        Ready(Template(VERBALIZER, "{text} was [MASK]"), folders["bert"], SoftTemplate(hard=["was"]))
    with pytest.raises(StackError, match="cloze"):
        Engine(run_config(folders["bert"], ["soft-template"], tmp_path / "run")).train()
