"""Soft prompts: vectors before the text, on encoders and decoders, on either side of padding, with LoRA and attacks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from plain import EXACT, LR
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, Stopped
from hybridengine.seams import Batch, View
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_checkpoint, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine.testing.models import tiny_tokenizer
from hybridengine.text import hide_tokens, usable_length
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.prompts.prompt_tuning import PromptTuning, PTuning

N = 3
CLASSIFIER = "AutoModelForSequenceClassification"
MODELS = {
    "bert": lambda: tiny_bert(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": lambda: tiny_gpt2(CLASSIFIER, num_labels=3, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "llama": lambda: tiny_llama(CLASSIFIER, num_labels=3, pad_token_id=0),
}
ROWS = [[2, 11, 12, 13, 14], [2, 21, 22], [2, 31, 32, 33, 34, 35, 36]]  # 2 stands for [CLS]


def _batch(bench, side="right", rows=ROWS, ids=()) -> Batch:
    """Rows of ids, the soft tokens behind the first one, padded on one side."""
    rows = [[row[0], *ids, *row[1:]] for row in rows]
    longest = max(map(len, rows))
    pad = [[0] * (longest - len(row)) for row in rows]
    both = [(p, [1] * len(row)) for p, row in zip(pad, rows, strict=True)]
    joined = [row + p if side == "right" else p + row for row, p in zip(rows, pad, strict=True)]
    mask = torch.tensor([real + p if side == "right" else p + real for p, real in both])
    inputs = {"input_ids": torch.tensor(joined), "attention_mask": mask}
    masks = {kind: {"input_ids": mask} for kind in ("attention", "perturbable")}
    counts = {"rows": len(rows), "all_rows": len(rows), "episodes": 1}
    return Batch(inputs, torch.tensor([0, 1, 2][: len(rows)]), tuple(range(len(rows))), masks, counts)


def _bench(name, *plugins, lr=0.0, **options):
    model = MODELS[name]().double()
    return set_up(plugins or [PromptTuning(n=N)], model, make_batch(), lr=lr, **options)


def _logits(bench, batch):
    bench.run.model.eval()
    with torch.no_grad():
        (out,) = bench.ctx.outputs(batch, [View(key=0)])
    return out.scores


def _by_hand(bench, row):
    """Logits of one row through `inputs_embeds`, without padding: what any soft prompt must come to."""
    model = bench.run.model
    table = model.get_input_embeddings()(torch.tensor([row]))
    vectors = bench.run.modules["prompt-tuning"].vectors[None]
    embeds = torch.cat([table[:, :1], vectors, table[:, 1:]], 1)
    return model(inputs_embeds=embeds).logits


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_soft_tokens_are_embeddings_among_the_others_whatever_the_padding(name, side):
    if name == "bert" and side == "left":
        pytest.skip("encoders classify what stands first; their tasks pad on the right")
    bench = _bench(name)
    batch = _batch(bench, side, ids=bench.run.soft_tokens.ids("prompt-tuning"))
    if side == "left":  # as `padded_inputs` makes them
        positions = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        batch.inputs["position_ids"] = positions
    expected = torch.cat([_by_hand(bench, row) for row in ROWS])
    assert (_logits(bench, batch) - expected).abs().max() < EXACT


def test_an_encoder_decoder_reads_soft_tokens_in_its_encoder():
    batch, start = make_batch(), torch.tensor([[0, 8, 9]])
    batch = replace(batch, inputs={**batch.inputs, "decoder_input_ids": batch.inputs["input_ids"] + 1})
    bench = set_up([PromptTuning(n=N)], tiny_t5(dropout_rate=0.0).double(), batch)
    model, row = bench.run.model.eval(), [5, 6, 7, 1]
    vectors = bench.run.modules["prompt-tuning"].vectors[None]
    ids = torch.tensor([bench.run.soft_tokens.ids("prompt-tuning") + row])
    with torch.no_grad():
        embeds = torch.cat([vectors, model.get_input_embeddings()(torch.tensor([row]))], 1)
        expected = model(inputs_embeds=embeds, decoder_input_ids=start).logits
        assert (model(input_ids=ids, decoder_input_ids=start).logits - expected).abs().max() < EXACT


def test_masked_language_modelling_hides_no_soft_token():
    """Also where attacks may move them."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([[2, -1, -2, 11, 12, 13]])
    changed, chosen = hide_tokens(tokenizer, ids, torch.ones_like(ids) == 1, torch.rand(1, 6, 3), share=1.0)
    assert chosen.tolist() == [[True, False, False, True, True, True]]
    assert changed[0, 1:3].tolist() == [-1, -2]


def test_refusals():
    def tokenizer(run):
        run.tokenizer = tiny_tokenizer(max_length=16)

    with pytest.raises(ConfigError, match="has no token; give some words"):
        _bench("bert", PromptTuning(n=N, text=" "), prepare=tokenizer)
    bench = _bench("bert", PromptTuning(n=14), prepare=tokenizer)
    assert usable_length(_bench("bert", PromptTuning(n=10), prepare=tokenizer).run) == 6
    with pytest.raises(ConfigError, match="14 soft tokens leave no room for text: the model takes 16"):
        usable_length(bench.run)


def test_three_steps_equal_plain_torch():
    """Prompt, head: descent on both, nothing else moves."""
    bench = _bench("llama", lr=LR)
    model = MODELS["llama"]().double().train()
    vectors = bench.run.modules["prompt-tuning"].vectors.detach().clone().requires_grad_(True)
    head = model.score.weight
    batch = _batch(bench, "right", [ROWS[0], ROWS[0][:1] + ROWS[2][3:]], bench.run.soft_tokens.ids("prompt-tuning"))
    table = model.get_input_embeddings()
    start = {k: v.clone() for k, v in bench.run.model.state_dict().items()}
    for _ in range(3):
        embeds = table(batch.inputs["input_ids"].clamp_min(0))
        embeds = torch.cat([embeds[:, :1], vectors.expand(2, -1, -1), embeds[:, 1 + N :]], 1)
        loss = functional.cross_entropy(model(inputs_embeds=embeds).logits, batch.targets)
        grads = torch.autograd.grad(loss, [vectors, head])
        with torch.no_grad():
            for p, g in zip((vectors, head), grads, strict=True):
                p -= LR * g
        bench.step([batch])
    assert (bench.run.modules["prompt-tuning"].vectors - vectors).abs().max() < EXACT
    assert (bench.run.model.score.weight - head).abs().max() < EXACT
    now = bench.run.model.state_dict()
    assert [k for k in start if not torch.equal(start[k], now[k])] == ["score.weight"]


def test_the_vectors_start_at_rows_of_the_vocabulary():
    first, again = _bench("bert"), _bench("bert")
    vectors = first.run.modules["prompt-tuning"].vectors
    table = first.run.model.get_input_embeddings().weight
    assert all((table == vector).all(1).any() for vector in vectors)
    assert torch.equal(vectors, again.run.modules["prompt-tuning"].vectors)
    other = _bench("bert", seed=1)
    assert not torch.equal(vectors, other.run.modules["prompt-tuning"].vectors)

    def tokenizer(run):
        run.tokenizer = tiny_tokenizer()

    words = _bench("bert", PromptTuning(n=N, text="good bad"), prepare=tokenizer)
    good, bad = tiny_tokenizer()("good bad", add_special_tokens=False)["input_ids"]
    assert torch.equal(words.run.modules["prompt-tuning"].vectors, table[[good, bad, good]])


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_starts_at_its_vectors_and_trains_the_network(encoder):
    bench = _bench("bert", PTuning(n=N, encoder=encoder, hidden=8), lr=LR)
    module = bench.run.modules["p-tuning"].double()
    assert torch.equal(module(), module.vectors)
    batch = _batch(bench, ids=bench.run.soft_tokens.ids("p-tuning"))
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    for _ in range(2):
        bench.step([batch])
    assert all(not torch.equal(before[k], p) for k, p in module.named_parameters())


@pytest.mark.parametrize("attacked", [False, True])
def test_attacks_leave_the_vectors_alone_unless_asked(attacked):
    method = PromptTuning(n=N, attacked=attacked)
    bench = _bench("bert", method, FGM(epsilon=0.5))
    bench.run.tokenizer = tiny_tokenizer()
    first = bench.run.tokenizer.cls_token_id
    (feature,) = method.transform_features(
        bench.run, [{"input_ids": [first, 11, 12], "perturbable": [0, 1, 1], "token_type_ids": [0, 0, 0], "length": 3}]
    )
    ids = bench.run.soft_tokens.ids("prompt-tuning")
    assert feature["perturbable"] == [0, *[int(attacked)] * N, 1, 1] and feature["length"] == 3 + N
    assert feature["input_ids"] == [first, *ids, 11, 12]


def test_weight_perturbations_reach_the_vectors_and_give_them_back():
    bench = _bench("bert", PromptTuning(n=N), SAM(rho=0.5))
    batch = _batch(bench, ids=bench.run.soft_tokens.ids("prompt-tuning"))
    assert "prompt-tuning/vectors" in bench.run.perturbed()
    before = bench.run.modules["prompt-tuning"].vectors.detach().clone()
    sharp = bench.gradients([batch])["prompt-tuning/vectors"]
    plain = _bench("bert").gradients([batch])["prompt-tuning/vectors"]
    assert not torch.allclose(sharp, plain)
    assert torch.equal(before, bench.run.modules["prompt-tuning"].vectors)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_teacher_that_knows_no_soft_tokens_reads_the_row_without_them(side):
    bench = _bench("llama")
    teacher = MODELS["llama"]().double().eval()

    def batch(ids):
        made = _batch(bench, side, ids=ids)
        made.inputs["position_ids"] = (made.inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return made

    (out,) = bench.ctx.outputs(batch(bench.run.soft_tokens.ids("prompt-tuning")), [View(key=0)], model=teacher)
    assert torch.equal(out.logits, teacher(**batch(()).inputs).logits)
    copy = bench.run.copy_of_model()  # a copy of the student knows them
    prompted = batch(bench.run.soft_tokens.ids("prompt-tuning"))
    (own,) = bench.ctx.outputs(prompted, [View(key=0)], model=copy)
    assert torch.equal(own.logits, _logits(bench, prompted))


# ---- soft prompt + LoRA + FGM + R-Drop + EMA on a decoder classifier -------------------------------------------------

STACK = [
    {"prompt-tuning": {"n": 4}},
    {"lora": {"r": 2, "dropout": 0.1}},
    "fgm",
    "rdrop",
    {"ema": {"decay": 0.5}},
]
TEXTS = ["good film", "a bad film , very bad", "very good", "bad", "this film is good", "not a good film"]


@pytest.fixture(scope="module", params=["right", "left"])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    made = tiny_checkpoint(root / "base", "llama", CLASSIFIER, num_labels=2, pad_token_id=0)
    tiny_tokenizer("decoder", padding_side=request.param).save_pretrained(made)
    return made


def _config(folder, output, **train):
    rows = [{"text": text, "label": "neg" if "bad" in text or "not" in text else "pos"} for text in TEXTS * 3]
    return {
        "model": {"name": str(folder)},
        "task": "text-classification",
        "data": {"train": rows, "validation": rows[:6]},
        "methods": STACK,
        "train": {"lr": 0.01, "epochs": 2, "batch_size": 4, "precision": "fp32", "max_length": 32, **train},
        "output": str(output),
    }


def test_the_stack_trains_resumes_saves_and_reloads(folder, tmp_path):
    """Stopped after every step it is the uninterrupted run; `predict` gives evaluation's own logits, padded or not."""
    Engine(_config(folder, tmp_path / "whole")).train()
    starts = 1
    while True:
        try:
            Engine(_config(folder, tmp_path / "pieces"), cancel=lambda: True).train()
            break
        except Stopped:
            starts += 1
    assert starts > 2
    for file in ("run_modules.safetensors", "adapter_model.safetensors", "prompt-tuning/adapter_model.safetensors"):
        assert (tmp_path / "pieces/best" / file).read_bytes() == (tmp_path / "whole/best" / file).read_bytes()
    predictor = hybridengine.load(tmp_path / "whole")
    records = predictor.predict(TEXTS)
    alone = [predictor.predict(text)[0] for text in TEXTS]
    for one, other in zip(records, alone, strict=True):
        for label, value in one["probabilities"].items():
            assert abs(value - other["probabilities"][label]) < 2e-6  # rounded to six digits
    stored = [json.loads(line) for line in (tmp_path / "whole/predictions.jsonl").read_text().splitlines()]
    found = {record["text"]: record["probabilities"] for record in stored}
    assert all(found[record["text"]] == record["probabilities"] for record in records)


def test_plain_peft_computes_the_same_where_no_row_is_padded(folder, tmp_path):
    """PEFT stands the prompt before the padding and hands on no ids: padded rows are another computation there."""
    Engine(_config(folder, tmp_path / "run")).train()
    best = tmp_path / "run" / "best"
    predictor = hybridengine.load(tmp_path / "run")
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    merged = PeftModel.from_pretrained(base, best).merge_and_unload()
    model = PeftModel.from_pretrained(merged, best / "prompt-tuning").eval()
    tokenizer = AutoTokenizer.from_pretrained(best)
    for text, record in zip(TEXTS, predictor.predict(TEXTS), strict=True):
        with torch.no_grad():
            scores = model(**tokenizer([text], return_tensors="pt", return_token_type_ids=False)).logits.softmax(-1)[0]
        for label, value in zip(predictor.run.labels, scores.tolist(), strict=True):
            assert abs(record["probabilities"][label] - value) < 5e-6, text  # fp32, merged or not, six digits
