"""Several patterns and the loss of hidden words against a reference; their vote; a second run that learns from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import EXACT, LR, apart, key
from prompted import MORE_ROWS, ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from torch import Tensor
from torch.nn import functional

from hybridengine import Engine, load
from hybridengine.errors import ConfigError, ModelError
from hybridengine.seams import Batch, KeyedRows, mix
from hybridengine.testing import tiny_tokenizer
from hybridengine.text import hide_tokens
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.prompts.calibration import Calibration
from hybridengine_plugins.prompts.pet import PET
from hybridengine_plugins.prompts.soft_verbalizer import SoftVerbalizer
from hybridengine_plugins.prompts.template import Template
from hybridengine_plugins.regularize.rdrop import RDrop

PATTERNS = ["{text} It was [MASK].", "all in all the {text} is [MASK]!", "yes, {text}? [MASK]"]
UNLABELLED = [{"text": "a dull story"}, {"text": "i love it very much"}, {"text": "awful"}]
LABELS = ("bad", "good", "mixed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


def ready(folders: dict[str, Path], name: str = "bert", method: PET | None = None, **options: Any) -> Ready:
    options = {"rows": MORE_ROWS, **options}
    others = options.pop("others", [])
    return Ready(Template(VERBALIZER, PATTERNS[0]), folders[name], method or PET(PATTERNS[1:]), *others, **options)


def pattern_of(step: int, row: int) -> str:
    """One of the patterns, by the promised number."""
    return PATTERNS[int(float(KeyedRows((0, "pet/pattern", step), [row]).uniform(1)) * 3)]


def encoded(tokenizer: Any, pattern: str, text: str) -> tuple[list[int], list[int]]:
    """Ids of a filled pattern, and which of them are the text's own."""
    if tokenizer.mask_token is None:
        pattern = pattern.split(" [MASK]")[0]
    text = text.replace("[MASK]", "[UNK]") if tokenizer.mask_token else text
    before = tokenizer(pattern.split("{text}")[0])["input_ids"]
    before = before[:-1] if tokenizer.mask_token else before  # without [SEP]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(pattern.replace("{text}", text))["input_ids"]
    assert whole[len(before) : len(before) + len(own)] == own
    return whole, [int(len(before) <= i < len(before) + len(own)) for i in range(len(whole))]


def language_loss(model: Any, tokenizer: Any, rows: list[tuple[int, list[int], list[int]]], step: int) -> Tensor:
    """Devlin et al. 2019: 15% of a text's tokens are guessed, of which 80% are masked and 10% replaced."""
    hidden, guessed = [], []
    for row, ids, own in rows:
        draws = KeyedRows((0, "pet/hidden", step), [row]).uniform(40, 3)[0].tolist()
        new, mine = list(ids), [i for i, o in enumerate(own) if o and draws[i][0] < 0.15]
        mine = mine or sorted((i for i, o in enumerate(own) if o), key=lambda i: draws[i][0])[:1]
        for i in mine:
            other = min(int(draws[i][2] * len(tokenizer)), len(tokenizer) - 1)
            other = tokenizer.mask_token_id if other in tokenizer.all_special_ids else other
            new[i] = tokenizer.mask_token_id if draws[i][1] < 0.8 else other if draws[i][1] < 0.9 else ids[i]
        hidden.append(new)
        guessed.append(mine)
    logits = model(**padded(tokenizer, hidden)).logits
    losses = [
        functional.cross_entropy(logits[n, mine], torch.tensor([rows[n][1][i] for i in mine]))
        for n, mine in enumerate(guessed)
    ]
    return torch.stack(losses).sum()


def padded(tokenizer: Any, ids: list[list[int]]) -> dict[str, Tensor]:
    made = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def collated(made: Ready, chosen: list[int]) -> Batch:
    """Training rows with all unlabelled ones."""
    split = made.run.splits["unlabelled"]
    part = made.task.collate(
        made.run, made.run.cloze.features(made.run, UNLABELLED), split.ids(range(len(UNLABELLED))), made.run.random
    )
    batch = made.collate(chosen)
    return replace(
        batch, parts={"unlabelled": part}, counts={**batch.counts, "all_rows": len(chosen) + len(UNLABELLED)}
    )


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("weight", [1e-4, 0.3])
def test_three_steps_match_the_paper(folders: dict[str, Path], weight: float, unlabelled: bool) -> None:
    """Schick and Schütze, sections 3.1 and 3.2: (1 - α) CE + α MLM, each row in the pattern that was drawn for it."""
    extra = UNLABELLED if unlabelled else []
    made = ready(folders, "dropout", PET(PATTERNS[1:], mlm_weight=weight), unlabelled=extra, lr=LR)
    plain = Ready(Template(VERBALIZER), folders["dropout"], rows=MORE_ROWS)
    model, tokenizer = plain.base.train(), plain.run.tokenizer
    words = tokenizer.convert_tokens_to_ids([VERBALIZER[label] for label in LABELS])
    start = made.bench.parameters()
    for step in range(3):
        chosen = list(range(3 * step, 3 * step + 3))
        batch = collated(made, chosen) if unlabelled else made.collate(chosen)
        made.bench.step([made.transformed(batch)])
        own = [(r, *encoded(tokenizer, pattern_of(step, r), MORE_ROWS[r]["text"])) for r in chosen]
        ids = made.run.splits["unlabelled"].ids(range(len(extra))) if unlabelled else []
        others = [(r, *encoded(tokenizer, pattern_of(step, r), row["text"])) for r, row in zip(ids, extra, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(step))
            inputs = padded(tokenizer, [ids for _, ids, _ in own])
            logits = model(**inputs).logits
            at = (inputs["input_ids"] == tokenizer.mask_token_id).nonzero()
            ce = functional.cross_entropy(logits[at[:, 0], at[:, 1]][:, words], batch.targets)
            torch.manual_seed(mix(key(step), "pet"))
            mlm = language_loss(model, tokenizer, own, step)
            if others:
                torch.manual_seed(mix(key(step), "pet", "unlabelled"))
                mlm = mlm + language_loss(model, tokenizer, others, step)
        loss = (1 - weight) * ce + weight * mlm / (len(own) + len(others))
        gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for value, g in zip(model.parameters(), gradient, strict=True):
                value.sub_(0 if g is None else LR * g)
        theirs = {k: p.detach() for k, p in model.named_parameters()}
        assert apart(made.bench.parameters(), theirs) < EXACT, step
    assert apart(made.bench.parameters(), start) > 1e-3
    expected = float(mlm.detach()) / (len(own) + len(others))
    assert made.bench.effect("pet", "mlm") == pytest.approx(expected, rel=2e-7)  # effects are told in fp32


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_model_learns_each_next_word_of_its_text(folders: dict[str, Path], side: str) -> None:
    made = ready(folders, "gpt2", PET(PATTERNS[1:], mlm_weight=0.3), side=side)
    gradient = made.bench.gradients([made.transformed()])
    model, tokenizer, terms = made.base, made.run.tokenizer, []
    words = tokenizer.convert_tokens_to_ids([VERBALIZER[label] for label in LABELS])
    for row, texts in enumerate(MORE_ROWS):
        ids, own = encoded(tokenizer, pattern_of(0, row), texts["text"])
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        guessed = [i for i, o in enumerate(own) if o and i > 0]
        language = -torch.stack([log_p[i - 1, ids[i]] for i in guessed]).mean()
        label = functional.cross_entropy(log_p[-1, words], made.batch.targets[row])
        terms.append(0.7 * label + 0.3 * language)
    expected = torch.autograd.grad(torch.stack(terms).mean(), list(model.parameters()), allow_unused=True)
    named = zip(dict(model.named_parameters()), expected, strict=True)
    # rows alone against rows of a padded batch: fp64 sums in another order
    assert apart(gradient, {k: g for k, g in named if g is not None}) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("combine", ["accuracy", "uniform"])
def test_the_patterns_vote_by_their_accuracy(folders: dict[str, Path], name: str, side: str, combine: str) -> None:
    """Section 3.3, "weighted": s(l|x) = Σ w(p) s_p(l|x) / Σ w(p), w the accuracy before training."""
    made = ready(folders, name, PET(PATTERNS[1:], combine=combine), side=side)
    scores, accuracies = [], []
    for pattern in PATTERNS:
        alone = Ready(Template(VERBALIZER, pattern), folders[name], rows=MORE_ROWS)
        scores.append(alone.logits())
        accuracies.append(float((scores[-1].argmax(-1) == alone.batch.targets).double().mean()))
    weights = torch.tensor(accuracies if combine == "accuracy" and any(accuracies) else [1.0] * 3, dtype=torch.float64)
    expected = sum(w * s for w, s in zip(weights / weights.sum(), scores, strict=True))
    assert isinstance(expected, Tensor)
    prediction = made.predict()
    torch.testing.assert_close(prediction.scores, expected.softmax(-1), rtol=1e-9, atol=1e-9)
    loss = functional.cross_entropy(expected, made.batch.targets, reduction="sum")
    torch.testing.assert_close(prediction.terms["loss"][0], loss, rtol=1e-9, atol=1e-9)


def test_patterns_are_drawn_by_seed_step_and_row(folders: dict[str, Path]) -> None:
    made, seen = ready(folders), set()
    for step in range(6):
        made.run.step = step
        batch = made.transformed()
        for row, texts in enumerate(MORE_ROWS):
            ids, _ = encoded(made.run.tokenizer, pattern_of(step, row), texts["text"])
            real = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row] == 1]
            assert real.tolist() == ids
            seen.add((row, pattern_of(step, row)))
    assert len(seen) > 2 * len(MORE_ROWS)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_splits_and_loss_scale_change_nothing(folders: dict[str, Path], name: str) -> None:
    def gradients(sizes: list[list[int]], **options: Any) -> dict[str, Tensor]:
        made = ready(folders, name, PET(PATTERNS[1:], mlm_weight=0.5), **options)
        return made.bench.gradients([made.transformed(made.collate(part)) for part in sizes])

    whole = gradients([list(range(8))])
    assert apart(gradients([[i] for i in range(8)]), whole) < EXACT
    assert apart(gradients([[0, 1], [2, 3], [4, 5], [6, 7]]), whole) < EXACT
    assert apart(gradients([list(range(8))], loss_scale=1024.0), whole) < EXACT
    # GPT2 reads rows padded on the left by other positions of the same tensors: its sums run in another order
    assert apart(gradients([list(range(8))], side="left"), whole) < (EXACT if name == "bert" else 1e-9)


def test_a_small_weight_leaves_plain_training(folders: dict[str, Path]) -> None:
    """The neutral element is the limit: the gradient is linear in the weight."""

    def gradient(weight: float) -> dict[str, Tensor]:
        made = ready(folders, method=PET(PATTERNS[1:], mlm_weight=weight))
        return made.bench.gradients([made.transformed()])

    plain = Ready(Template(VERBALIZER), folders["bert"], rows=MORE_ROWS)
    written = plain.bench.gradients([ready(folders).transformed()])
    assert apart(gradient(1e-13), written) < EXACT
    far, near = apart(gradient(2e-3), written), apart(gradient(1e-3), written)
    assert far == pytest.approx(2 * near, rel=1e-6)


def test_passes(folders: dict[str, Path]) -> None:
    made = ready(folders, unlabelled=UNLABELLED)
    made.bench.step([made.transformed(collated(made, [0, 1, 2, 3]))])
    assert made.bench.ctx.trace.text() == "F4 F4 F3 B S"


@pytest.mark.parametrize("others", [[FGM(epsilon=0.1)], [RDrop()], [SoftVerbalizer()]])
@pytest.mark.parametrize("name", ["dropout", "gpt2"])
def test_stacks(folders: dict[str, Path], name: str, others: list[Any]) -> None:
    made = ready(folders, name, others=others, lr=0.1)
    for _ in range(2):
        made.bench.step([made.transformed()])
    assert made.bench.effect("pet", "mlm") > 0
    (method,) = others
    if isinstance(method, FGM):
        assert made.bench.effect("fgm", "delta_norm") > 0


def test_a_text_without_content_is_calibrated_under_all_patterns(folders: dict[str, Path]) -> None:
    rows = [*MORE_ROWS, {"text": "N/A", "label": "bad"}]
    made = ready(folders, others=[Calibration(["N/A"])], rows=rows)
    scores = made.predict().scores
    assert scores is not None
    torch.testing.assert_close(scores[-1], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_hiding_counts() -> None:
    """80, 10, 10 of every hundred chosen, and special tokens never drawn."""
    tokenizer = tiny_tokenizer()
    ids = torch.full((400, 50), 20)
    draws = KeyedRows(("hide",), range(400)).uniform(50, 3)
    ordinary = torch.ones_like(ids, dtype=torch.bool)
    ordinary[:, :10] = False
    hidden, chosen = hide_tokens(tokenizer, ids, ordinary, draws)
    assert not chosen[:, :10].any() and torch.equal(hidden[~chosen], ids[~chosen])
    share = float(chosen.double().mean() / 0.8)
    masked = float((hidden[chosen] == tokenizer.mask_token_id).double().mean())
    same = float((hidden[chosen] == 20).double().mean())
    # 16,000 draws and 2,400 of them chosen: four standard errors
    assert abs(share - 0.15) < 4 * (0.15 * 0.85 / 16000) ** 0.5
    assert abs(masked - 0.8) < 4 * (0.8 * 0.2 / 2400) ** 0.5 + 0.1 * 5 / len(tokenizer)
    assert abs(same - 0.1) < 4 * (0.1 * 0.9 / 2400) ** 0.5 + 0.1 / len(tokenizer)
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != tokenizer.mask_token_id])
    assert not torch.isin(hidden, special).any()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["{text} it is"], r"patterns must hold \[MASK\] exactly once"),
        (["it is [MASK]"], "patterns must hold a column"),
    ],
)
def test_malformed_patterns(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PET(patterns)


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"comes after \[MASK\]; put \[MASK\] at the end"):
        ready(folders, "gpt2", PET(["[MASK] is {text}"]))
    with pytest.raises(ConfigError, match=r"'terrible' .* put a space before \[MASK\]"):
        ready(folders, method=PET(["{text} it is wonder[MASK]"]))
    methods: list[Any] = ["template", "verbalizer", {"pet": {"patterns": PATTERNS[1:]}}, "demonstrations"]
    with pytest.raises(ConfigError, match="both write each row in their own way; remove one of the two"):
        Engine(run_config(folders["bert"], methods, tmp_path / "run")).validate()


# ---- the second run --------------------------------------------------------------------------------------------------


def test_a_classifier_learns_from_the_finished_vote(folders: dict[str, Path], tmp_path: Path) -> None:
    """Section 3.4, two commands: the student's term is the divergence from what the finished run predicts for rows."""
    template = {"template": {"text": PATTERNS[0], "verbalizer": VERBALIZER}}
    first = run_config(folders["bert"], [template, {"pet": {"patterns": PATTERNS[1:]}}], tmp_path / "pet")
    first["data"]["unlabelled"] = UNLABELLED
    Engine(first).train()
    teacher = loaded_as_it_said(tmp_path / "pet")
    distill = {"distill": {"teacher": str(tmp_path / "pet"), "alpha": 1.0, "temperature": 2.0}}
    second = run_config(folders["bert"], [distill, {"sgd": {"momentum": 0.0}}, "constant"], tmp_path / "student")
    second["data"]["unlabelled"] = UNLABELLED
    second["train"] |= {"max_steps": 1, "batch_size": len(MORE_ROWS), "lr": 1e-4, "clip": 0}
    engine = Engine(second).adapt()
    start = {k: v.detach().clone() for k, v in engine._run.model.state_dict().items()}
    summary = engine.train()
    assert summary["status"] == "finished" and summary["methods"]["distill"]["kl"]["mean"] > 0
    line = json.loads((tmp_path / "student" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    # the loss of the first step, by hand
    model, tokenizer = engine._run.model, engine._run.tokenizer
    model.load_state_dict(start)
    model.eval()  # without dropout training sees the same
    drawn = [row["text"] for row in [*MORE_ROWS, *(UNLABELLED * 4)[: len(MORE_ROWS)]]]
    told = [[r["probabilities"][label] for label in LABELS] for r in teacher.predict(drawn)]
    soft = (torch.tensor(told).log() / 2).softmax(-1)
    with torch.no_grad():
        logits = model(**tokenizer(drawn, padding=True, return_tensors="pt")).logits / 2
    kl = (soft * (soft.log() - logits.log_softmax(-1))).sum(-1)
    # Ten labelled rows, and as many unlabelled ones: three in turn, so one of them a fourth time. Probabilities with
    # six digits move a divergence by some 1e-5.
    labelled, turns = kl[: len(MORE_ROWS)], kl[len(MORE_ROWS) : len(MORE_ROWS) + 3]
    low, high = (4 * float(labelled.sum() + 3 * turns.sum() + one) / 20 for one in (turns.min(), turns.max()))
    assert low - 1e-4 <= line["terms"]["distill"] <= high + 1e-4 and high > 1e-3
    records = load(tmp_path / "student").predict([row["text"] for row in ROWS])
    assert {record["prediction"] for record in records} <= set(LABELS)


def test_a_finished_run_of_other_labels_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "label": "x" + row["label"]} for row in MORE_ROWS]
    words = {"x" + label: word for label, word in VERBALIZER.items()}
    first = run_config(folders["bert"], [{"template": {"verbalizer": words}}], tmp_path / "first")
    first["data"] = {"train": rows, "validation": rows[:3], "carve": {}}
    Engine(first).train()
    second = run_config(folders["bert"], [{"distill": {"teacher": str(tmp_path / "first")}}], tmp_path / "second")
    with pytest.raises(ModelError, match=r"distill: .* cannot teach: its labels are \['xbad'.*in order; give a run"):
        Engine(second).validate()
