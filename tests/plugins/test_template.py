"""Prompt templates: the mask survives, words score as defined, and models without a head are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompted import ROWS, VERBALIZER, Ready, checkpoints

from hybridengine.errors import ConfigError, ModelError
from hybridengine.plugin import StackView
from hybridengine.seams import View
from hybridengine.stack import check_stack
from hybridengine.stack.plan import make_plan
from hybridengine.stack.resolve import as_method
from hybridengine.testing import WORDS, tiny_config, tiny_tokenizer
from hybridengine.text.branches import Branches
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.prompts.template import Template

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "_models" / "stories260k"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))


# ---- words and scores ------------------------------------------------------------------------------------------------


def test_a_masked_model_scores_words_at_the_mask_of_the_whole_vocabulary(folders):
    ready = Ready(Template(VERBALIZER), folders["bert"])
    tokenizer, ids = ready.run.tokenizer, ready.batch.inputs["input_ids"]
    with torch.no_grad():
        full = ready.base.eval()(**ready.batch.inputs).logits.log_softmax(-1)
    for row in range(len(ROWS)):
        (mask,) = [i for i, token in enumerate(ids[row].tolist()) if token == tokenizer.mask_token_id]
        words = [VERBALIZER[label] for label in ready.run.labels]
        expected = full[row, mask, tokenizer.convert_tokens_to_ids(words)]
        torch.testing.assert_close(ready.logits()[row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("text", ["{text} it was [MASK].", "{text} it was [MASK]", "{text} [MASK]"])
def test_a_causal_model_scores_the_token_after_the_text(folders, name, text):
    ready = Ready(Template(VERBALIZER, text), folders[name])
    tokenizer = ready.run.tokenizer
    for index, row in enumerate(ROWS):
        prompt = text.replace("{text}", row["text"]).split(" [MASK]" if "[MASK] it" not in text else "\0")[0]
        if "[MASK]" in row["text"]:  # the row's own words come through untouched
            prompt = text.rpartition(" [MASK]")[0].replace("{text}", row["text"])
        one = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            last = ready.base.eval()(**one).logits[0, -1].log_softmax(-1)
        words = [VERBALIZER[label] for label in ready.run.labels]
        expected = last[tokenizer.convert_tokens_to_ids(words)]
        # rows of a padded batch against rows alone: fp64 sums in another order
        torch.testing.assert_close(ready.logits()[index], expected, rtol=1e-9, atol=1e-9)


def test_several_words_of_several_tokens(folders):
    """`qx` is two pieces: two masks everywhere, log-probabilities averaged over a word's own tokens."""
    verbalizer = {"bad": ["terrible", "qx"], "good": ["great", "good", "zzz"], "mixed": "fine"}
    ready = Ready(Template(verbalizer), folders["bert"])
    tokenizer, ids = ready.run.tokenizer, ready.batch.inputs["input_ids"]
    with torch.no_grad():
        full = ready.base.eval()(**ready.batch.inputs).logits.log_softmax(-1)
    for row in range(len(ROWS)):
        masks = [i for i, token in enumerate(ids[row].tolist()) if token == tokenizer.mask_token_id]
        assert len(masks) == 3  # `zzz` is three pieces
        for c, label in enumerate(ready.run.labels):
            scores = []
            words = verbalizer[label] if isinstance(verbalizer[label], list) else [verbalizer[label]]
            for word in words:
                tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
                scores.append(sum(full[row, m, t] for m, t in zip(masks, tokens, strict=False)) / len(tokens))
            expected = torch.stack(scores).exp().mean().log()
            torch.testing.assert_close(ready.logits()[row, c], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_longer_words_of_a_causal_model_follow_the_chain_rule(folders, name, attention, side):
    """One forward with branches equals one forward per word."""
    verbalizer = {"bad": ["terrible", "qx"], "good": ["great", "zzz"], "mixed": "fq"}
    ready = Ready(Template(verbalizer, "{text} it was [MASK]."), folders[name], side=side)
    ready.base.set_attn_implementation(attention)
    tokenizer = ready.run.tokenizer
    for index, row in enumerate(ROWS):
        prompt = tokenizer(f"{row['text']} it was")["input_ids"]
        for c, label in enumerate(ready.run.labels):
            scores = []
            words = verbalizer[label] if isinstance(verbalizer[label], list) else [verbalizer[label]]
            for word in words:
                tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
                alone = copy.deepcopy(ready.base)
                alone._forward_pre_hooks.clear()
                with torch.no_grad():
                    logp = alone.eval()(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
                scores.append(sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(tokens)))
            expected = torch.stack(scores).exp().mean().log()
            # fp64, but Llama's eager attention takes its softmax in fp32
            close = 1e-9 if attention == "sdpa" else 1e-6
            torch.testing.assert_close(ready.logits()[index, c], expected, rtol=close, atol=close)


def test_a_model_that_does_not_obey_the_branches_is_refused(folders):
    from transformers import AutoModelForCausalLM

    class Deaf(torch.nn.Module):
        """Drops the mask, so that words see each other."""

        def __init__(self):
            super().__init__()
            self.inner = AutoModelForCausalLM.from_pretrained(folders["llama"])

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.inner(input_ids, position_ids=position_ids)

    with pytest.raises(ModelError, match="words of one token"):
        Branches([[7, 8], [9, 10, 11]]).install(Deaf(), [5, 6])


def test_relabelling_classes_permutes_logits(folders):
    first = Ready(Template(VERBALIZER), folders["bert"]).logits()
    turned = {"bad": "great", "good": "fine", "mixed": "terrible"}
    second = Ready(Template(turned), folders["bert"]).logits()
    assert torch.equal(first[:, [1, 2, 0]], second)  # labels in id order: bad, good, mixed


def test_repeating_a_word_does_not_favour_its_class(folders):
    first = Ready(Template(VERBALIZER), folders["bert"]).logits()
    second = Ready(Template({**VERBALIZER, "bad": ["terrible", "terrible"]}), folders["bert"]).logits()
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


# ---- rows ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.sampled_from([*WORDS, "qx", "[MASK]", "[SEP]", "Zürich"]), min_size=1, max_size=90),
    pair=st.lists(st.sampled_from(WORDS), min_size=1, max_size=90),
    limit=st.integers(14, 64),
    label_word=st.sampled_from(["great", "qx"]),
    text=st.sampled_from(["{text} it was [MASK].", "[MASK]: {text}", "{text_pair}? [MASK], {text} it was"]),
)
def test_masks_and_template_survive_every_truncation(words, pair, limit, label_word, text):
    from hybridengine.text import Cloze, pieces_of

    tokenizer = tiny_tokenizer()
    cloze = Cloze(tokenizer, pieces_of(text), [["good"], [label_word]], masked=True)
    row = {"text": " ".join(words), "text_pair": " ".join(pair)}
    (feature,) = cloze.encode([row], limit)
    ids, mine = feature["input_ids"], feature["perturbable"]
    assert len(ids) == len(mine) == len(feature["token_type_ids"]) == feature["length"] <= limit
    assert ids.count(tokenizer.mask_token_id) == cloze.masks == (1 if label_word == "great" else 2)
    literal = [w for w in tokenizer(text.replace("{text}", " ").replace("{text_pair}", " "))["input_ids"]]
    template = [t for t, m in zip(ids, mine, strict=True) if not m and t != tokenizer.mask_token_id]
    assert _is_subsequence([t for t in literal if t != tokenizer.mask_token_id], template)
    assert all(
        t not in tokenizer.all_special_ids or t == tokenizer.unk_token_id for t, m in zip(ids, mine, strict=True) if m
    )
    assert sum(mine) > 0 or not any(w in WORDS for w in words[:1])
    longest = {**row, "text": row["text"] + " good"}
    whole = cloze.encode([longest], 10_000)[0]
    assert not whole["truncated"] and feature["truncated"] == (cloze.encode([row], 10_000)[0]["length"] > limit)


def _is_subsequence(small, large):
    rest = iter(large)
    return all(token in rest for token in small)


def test_what_is_cut_is_the_end_of_the_longest_text(folders):
    rows = [
        {"text": "good " * 30, "text_pair": "bad great", "label": "good"},
        {"text": "a", "text_pair": "b", "label": "bad"},
    ]
    template = Template({"bad": "terrible", "good": "great"}, "{text} and {text_pair} it was [MASK]")
    ready = Ready(template, folders["bert"], rows=rows, max_length=16)
    tokens = ready.run.tokenizer.convert_ids_to_tokens(ready.features[0]["input_ids"])
    assert tokens == ["[CLS]", *["good"] * 8, "and", "bad", "great", "it", "was", "[MASK]", "[SEP]"]
    assert ready.features[0]["perturbable"] == [0, *[1] * 8, 0, 1, 1, 0, 0, 0, 0]
    assert ready.features[0]["truncated"] and not ready.features[1]["truncated"]
    assert [f["label"] for f in ready.features] == [1, 0]


def test_a_template_longer_than_a_row_may_be_is_refused(folders):
    with pytest.raises(ConfigError, match=r"template alone takes 6 of 6"):
        Ready(Template(VERBALIZER), folders["bert"], max_length=6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_side_changes_no_logits(folders, name):
    right = Ready(Template(VERBALIZER), folders[name], side="right")
    left = Ready(Template(VERBALIZER), folders[name], side="left")
    assert not torch.equal(right.batch.inputs["attention_mask"], left.batch.inputs["attention_mask"])
    torch.testing.assert_close(right.logits(), left.logits(), rtol=1e-9, atol=1e-9)


# ---- in a stack ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["terrible", "qx"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_trains_with_lora_under_attack_and_learns(folders, name, word):
    ready = Ready(Template({**VERBALIZER, "bad": word}), folders[name], LoRA(r=4), FGM(epsilon=0.1), fp64=False)
    ready.run.optimizer = torch.optim.Adam(list(ready.run.may_optimise.values()), lr=2e-2)
    assert all("lora_" in k for k in ready.run.may_optimise)
    ready.run.model.train()
    for _ in range(30):
        ready.bench.step([ready.batch])
    assert ready.logits().argmax(-1).tolist() == ready.batch.targets.tolist()
    ready.bench.effects.flush()
    assert ready.bench.effects.summary()["fgm"]["delta_norm"]["last"] > 0


def test_stacked_views_see_class_logits(folders):
    ready = Ready(Template(VERBALIZER), folders["bert"])
    two = ready.bench.ctx.outputs(ready.batch, [View(key=1), View(key=2)])
    assert [tuple(out.logits.shape) for out in two] == [(4, 3), (4, 3)]


def test_the_plan_runs_without_the_real_model():
    (phase,) = make_plan(tiny_config(), [as_method(Template(VERBALIZER)), as_method(FGM())], 10).phases
    assert phase.counts["F"] == 2


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260k is not in ../shared/data/_models")
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_real_causal_model_prefers_what_fits(side):
    """A model of children's stories, untrained for the task, knows how a child feels; `sad` is two of its tokens."""
    rows = [
        {"text": "Lily lost her toy. She started to cry.", "label": "sad"},
        {"text": "Lily got a new toy. She smiled.", "label": "happy"},
        {"text": "Tim fell down and got hurt. It was a big loud dog. Lily", "label": "sad"},
        {"text": "Lily loved to play in the park with her friends.", "label": "happy"},
    ]
    template = Template({"happy": "happy", "sad": "sad"}, "{text} Lily felt [MASK].")
    ready = Ready(template, STORIES, rows=rows, side=side, fp64=False)
    assert ready.logits().argmax(-1).tolist() == ready.batch.targets.tolist()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "{text} it was"}, r"\[MASK\] exactly once"),
        ({"text": "{text} [MASK] [MASK]"}, r"\[MASK\] exactly once"),
        ({"text": "it was [MASK]"}, "must hold a column"),
        ({"verbalizer": {"good": [], "bad": "x"}}, "'good' has an empty word"),
        ({"verbalizer": {"good": "a", "bad": " "}}, "'bad' has an empty word"),
    ],
)
def test_refuses_a_malformed_template(options, message):
    with pytest.raises(ValueError, match=message):
        Template(**{"verbalizer": VERBALIZER, **options})


def test_the_verbalizer_must_name_the_labels():
    stack = StackView([], {"labels": ["bad", "good", "mixed", "other"]})
    problems = Template({**VERBALIZER, "goood": "nice"}).check_stack(stack)
    assert ["'other'" in problems[0], "Did you mean 'good'" in problems[1]] == [True, True]
    assert Template(VERBALIZER).check_stack(StackView([], {"labels": ["bad", "good", "mixed"]})) == []


@pytest.mark.parametrize(
    ("folder", "template", "error", "message"),
    [
        ("headless", Template(VERBALIZER), ModelError, "no language-model head .*masked-language-modeling"),
        ("t5", Template(VERBALIZER), ModelError, "neither a masked nor a causal"),
        ("llama", Template(VERBALIZER, "[MASK] it was {text}"), ConfigError, r"comes after \[MASK\]"),
        ("bert", Template({**VERBALIZER, "bad": "great"}), ConfigError, "share a word"),
        ("bert", Template({**VERBALIZER, "bad": "¤"}), ConfigError, "does not know"),
        ("bert", Template(VERBALIZER, "{title} [MASK]"), ConfigError, "no 'title'"),
    ],
)
def test_refusals(folders, folder, template, error, message):
    with pytest.raises(error, match=message):
        Ready(template, folders[folder])


def test_not_with_episodes():
    methods = [as_method(Template(VERBALIZER)), as_method(Episodes())]
    (problem,) = check_stack(methods, {"labels", "functional"})
    assert "template" in problem and "renumber" in problem
