"""Models and tokenizers that are not there, damaged, or do not fit: told by `validate`, before anything is written."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from bench import Bench, call

from hybridengine.engine import Engine
from hybridengine.testing import tiny_checkpoint

VERBALIZER = {"verbalizer": {"negative": "bad", "positive": "good"}}


def engine(bench: Bench, model: object, **sections: Any) -> Callable[[], Engine]:
    return lambda: Engine(bench.config(model={"name": str(model)}, **sections))


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["there are no weights (*.safetensors)"]),
    "only a pickle": (to_pickle, ["a pickle (.bin), which can run code and is never loaded", "save_pretrained"]),
    "cut weights": (cut, ["model.safetensors: the weights are damaged or cut off", "download the file again"]),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), ["the weights are damaged or cut off"]),
    "weights of another model": (lambda f: change(f, hidden_size=48), ["belong to different models"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["there is no config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ["the configuration cannot be loaded"]),
    "unknown architecture": (lambda f: change(f, model_type="bertt"), ["model type `bertt`"]),
    "no architecture": (lambda f: change(f, model_type=None), ["the configuration cannot be loaded"]),
    "wrong type": (lambda f: change(f, hidden_size="wide"), ["'hidden_size' expected int, got str"]),
    "no tokenizer": (without_tokenizer, ["there is no tokenizer in this folder", "model.tokenizer"]),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["the tokenizer cannot be loaded"]),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["the tokenizer cannot be loaded"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder(name: str, bench: Bench) -> None:
    harm, told = DAMAGE[name]
    folder = shutil.copytree(bench.models / "bert", bench.folder / "model")
    harm(folder)
    bench.refused(engine(bench, folder), str(folder), *told)


def test_a_tokenizer_of_another_model(bench: Bench) -> None:
    folder = tiny_checkpoint(bench.folder / "small", vocab_size=12)
    bench.refused(engine(bench, folder), "token", "model.tokenizer", "embeddings")


def test_names_that_lead_nowhere(bench: Bench) -> None:
    for name in (bench.folder / "none", "./none", "a/b/c"):
        bench.refused(engine(bench, name), f"model.name: the folder {name} does not exist", roads="validate plan train")
    bench.refused(engine(bench, bench.folder / "rows.jsonl"), "is a file; give the folder that holds config.json")
    bench.refused(engine(bench, "a" * 5000), "model.name:", "File name too long")
    (bench.folder / "empty").mkdir()
    bench.refused(engine(bench, bench.folder / "empty"), "there is no config.json")
    path = bench.write(bench.text(model="model: {name: ./none}"))
    code, out, err = call("validate", path)
    assert (code, out) == (2, "") and f"{path}:2: model.name: the folder ./none does not exist" in err


def test_a_hub_id_in_offline_mode(bench: Bench) -> None:
    bench.refused(
        engine(bench, "bert-base-uncased"),
        "bert-base-uncased is no local folder",
        "set model.name: FOLDER",
        roads="plan",
    )


def test_a_hub_id_without_network_is_told_without_retries(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def no_address(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def no_waiting(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s for another try")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("time.sleep", no_waiting)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    bench.refused(engine(bench, "some/model"), "some/model is no local folder", "Without network", roads="validate")
    dataset = engine(bench, bench.models / "bert", data={"train": "hf:some/rows"})
    bench.refused(dataset, "hf:some/rows: cannot be loaded from the hub", "Without network", roads="validate")
    assert asked and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_tokenizer_without_padding(bench: Bench) -> None:
    folder = tiny_checkpoint(bench.folder / "gpt", "gpt2")
    notes = engine(bench, folder)().validate()
    assert any("the tokenizer has no padding token; '</s>' is used" in note for note in notes)
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("eos_token", "bos_token", "unk_token")}
    path.write_text(json.dumps(kept))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    bench.refused(engine(bench, folder), "no padding token", "set `pad_token` in its tokenizer_config.json")


@pytest.mark.parametrize("model", ["bert", "bare"])
def test_a_template_on_a_model_without_language_model_head(model: str, bench: Bench) -> None:
    make = engine(bench, bench.models / model, methods=[{"template": VERBALIZER}])
    bench.refused(make, "has no language-model head", "train a head first with `task: masked-language-modeling`")


def test_a_verbalizer_that_does_not_fit_the_labels(bench: Bench) -> None:
    words = {"verbalizer": {"negative": "bad", "postive": "good"}}
    make = engine(bench, bench.models / "bert", methods=[{"template": words}])
    bench.refused(make, "no word for label 'positive'", "'postive', which is no label. Did you mean 'positive'?")


def test_a_model_and_a_task_that_do_not_fit(bench: Bench) -> None:
    folder = tiny_checkpoint(bench.folder / "t5", "t5")
    bench.refused(engine(bench, folder), "a forward pass over two training rows fails", "'text-classification'")
