"""Broken configs: file and line, what was expected, the nearest name, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import Bench, call

from hybridengine.engine import Engine

# What is added from line 6 on, and what the error must tell.
ADDED = {
    "unknown key": ("trian: {epochs: 1}", ["config.yaml:6: unknown key 'trian'. Did you mean 'train'?"]),
    "unknown key inside": (
        "evaluate:\n  metrics: accuracy",
        ["config.yaml:7: unknown key 'evaluate.metrics'. Did you mean 'metric'?"],
    ),
    "unknown method": ("methods:\n  - fgm\n  - lroa", ["config.yaml:8: unknown method 'lroa'. Did you mean 'lora'?"]),
    "misspelt parameter": (
        "methods:\n  - fgm:\n      epsilom: 1",
        ["config.yaml:8: unknown key 'methods.0.fgm.epsilom'. Did you mean 'epsilon'?"],
    ),
    "parameter of wrong type": (
        "methods:\n  - lora: {r: many}",
        ["config.yaml:7: methods.0.lora.r: must be a valid integer", "'many'"],
    ),
    "parameter out of range": (
        "methods:\n  - pgd: {epsilon: -1}",
        ["config.yaml:7: methods.0.pgd.epsilon: must be greater than or equal to 0, got -1"],
    ),
    "missing parameter": ("methods: [distill]", ["config.yaml:6: missing key 'methods.0.distill.teacher'"]),
    "method twice": ("methods:\n  - fgm\n  - fgm: {epsilon: 2}", ["config.yaml:8: method 'fgm' is named twice"]),
    "two methods in an entry": ("methods:\n  - fgm:\n    lora: {r: 2}", ["config.yaml:6:", "one name per entry"]),
    "methods as text": ("methods: fgm", ["config.yaml:6: methods: must be a list such as [a, b]; got 'fgm'"]),
    "method as number": ("methods: [3]", ["config.yaml:6: methods.0: must be a name, or {name: {parameters}}; got 3"]),
    "parameters as number": (
        "methods:\n  - fgm: 3",
        ["config.yaml:7: methods.0.fgm: must be a section of keys; got 3"],
    ),
    "a task among the methods": (
        "methods: [text-classification]",
        ["config.yaml:6: 'text-classification' is a task plugin; name it under `task`"],
    ),
    "order as text": ("methods:\n  - fgm: {order: first}", ["config.yaml:7: fgm.order must be a whole number"]),
    "empty section": ("log:", ["config.yaml:6: log: must be a section of keys, such as every, to; it is empty"]),
    "section as list": ("log: [tensorboard]", ["config.yaml:6: log: must be a section of keys"]),
    "unknown metric": (
        "evaluate: {metric: acuracy}",
        ["config.yaml:6: evaluate.metric: text-classification has no metric 'acuracy'. Did you mean 'accuracy'?"],
    ),
    "unknown metric to watch": (
        "methods:\n  - early-stopping: {metric: acuracy}",
        ["early-stopping: the task has no metric 'acuracy'. Did you mean 'accuracy'?"],
    ),
    "logger that is not there": ("log: {to: [wandb]}", ["config.yaml:6: log.to: wandb is not installed; run `pip"]),
    "checkpoint that is not there": (
        "resume: run/checkpoints/step-9",
        ["config.yaml:6: resume: there is no checkpoint"],
    ),
    "key twice": ("seed: 1\nseed: 2", ["config.yaml:7: key 'seed' appears twice; keep one"]),
    "key twice, deeper": ("evaluate:\n  test: true\n  test: false", ["config.yaml:8: key 'test' appears twice"]),
    "tab": ("evaluate:\n\ttest: true", ["config.yaml:7: not valid YAML", "spaces, not tabs"]),
    "second document": ("---\nlog: {every: 1}", ["config.yaml:6: not valid YAML"]),
    "a date that is none": ("resume: 2024-02-30", ["config.yaml:6: '2024-02-30' cannot be read", "in quotes"]),
    "a key that is a list": ("? [a, b]\n: 1", ["config.yaml:6: a key must be a plain word"]),
    "a tag that would run code": (
        "log: !!python/object/apply:os.system [touch pwned]",
        ["config.yaml:6: log: must be"],
    ),
    "stages as mapping": ("stages: {train: {lr: 1}}", ["config.yaml:6: stages: must be a list"]),
    "unknown keys deep in stages": (
        "stages:\n  - train:\n      lrr: 1e-4\n  - methods:\n      - fgm: {epsilom: 1}\n    train: {max_steps: 0}",
        [
            "config.yaml:8: unknown key 'train.lrr'. Did you mean 'lr'? (stage 1)",
            "config.yaml:10: unknown key 'methods.0.fgm.epsilom'. Did you mean 'epsilon'? (stage 2)",
            "config.yaml:11: train.max_steps: must be greater than 0, got 0 (stage 2)",
        ],
    ),
}

# A line that takes the place of a good one.
REPLACED = {
    "unknown task": (
        {"task": "task: text-clasification"},
        ["config.yaml:1: unknown task 'text-clasification'. Did you mean 'text-classification'?"],
    ),
    "a method as task": ({"task": "task: fgm"}, ["config.yaml:1: 'fgm' is a method plugin; name it under `methods`"]),
    "task option": (
        {"task": "task:\n  text-classification: {multilabel: true}"},
        ["config.yaml:2: unknown key 'task.text-classification.multilabel'. Did you mean 'multi_label'?"],
    ),
    "model as text": ({"model": "model: bert"}, ["config.yaml:2: model: must be a section of keys, such as", "'bert'"]),
    "no model": ({"model": ""}, ["config.yaml:1: missing key 'model'"]),
    "data plugin": (
        {"data": "data: {use: flies, train: rows.jsonl}"},
        ["config.yaml:3: unknown data 'flies'. Did you mean 'files'?"],
    ),
    "data key": (
        {"data": "data: {trian: rows.jsonl, train: rows.jsonl}"},
        ["config.yaml:3: unknown key 'data.trian'. Did you mean 'train'?"],
    ),
    "out of range": ({"train": "train: {epochs: -1}"}, ["config.yaml:5: train.epochs: must be greater than 0, got -1"]),
    "text as number": ({"train": "train: {lr: fast}"}, ["config.yaml:5: train.lr: must be a valid number", "'fast'"]),
    "truth as number": ({"train": "train: {batch_size: yes}"}, ["config.yaml:5: train.batch_size: must be a number"]),
    "not finite": ({"train": "train: {lr: .inf}"}, ["config.yaml:5: train.lr: must be a finite number, got inf"]),
    "device": ({"train": "train: {device: gpu}"}, ["config.yaml:5: train.device: must be auto | cpu | cuda"]),
    "output empty": ({"output": "output: ''"}, ["config.yaml:4: output: must have at least 1 character"]),
}

WHOLE = {
    "empty": (b"", "expected a mapping with keys such as task, model, data"),
    "only a comment": (b"# nothing\n", "`hybridengine init` writes an example"),
    "list": (b"- task\n- model\n", "expected a mapping"),
    "text": (b"hello", "expected a mapping"),
    "broken": (b"task: [a\nmodel: }", "config.yaml:2: not valid YAML"),
    "binary": (bytes(range(256)), "config.yaml: not UTF-8 text"),
    "UTF-16": ("task: a".encode("utf-16"), "config.yaml: not UTF-8 text"),
    "NUL": (b"task: a\0b", "config.yaml: not valid YAML"),
    "alias of itself": (b"task: &a [*a]", "config.yaml:1: too many or too deeply nested values"),
    "aliases of aliases": (
        b"".join(
            b"%c: &%c [%s]\n" % (97 + i, 97 + i, b",".join([b"*%c" % (96 + i) if i else b"x"] * 9)) for i in range(8)
        ),
        "config.yaml:1: too many or too deeply nested values",
    ),
    "nested": (b"task: " + b"[" * 1200 + b"]" * 1200, "nested too deeply"),
}

OVERRIDES = {
    "train.lr": "override 'train.lr': write it as key.subkey=value, e.g. train.lr=1e-5",
    "=1": "write it as key.subkey=value",
    "train..lr=1": "write it as key.subkey=value",
    "train.lr=[": "override 'train.lr=[': the value is not valid YAML",
    "train.lr=fast": "override 'train.lr=fast': train.lr: must be a valid number",
    "trian.lr=1": "override 'trian.lr=1': unknown key 'trian'. Did you mean 'train'?",
    "output.name=x": "'output' is not a section",
    "methods=[fgm, fmg]": "override 'methods=[fgm, fmg]': unknown method 'fmg'. Did you mean 'fgm'?",
    "train={lr: 1, lr: 2}": "key 'lr' appears twice",
    "evaluate.metric=acuracy": "override 'evaluate.metric=acuracy': evaluate.metric: text-classification has no metric",
}


@pytest.mark.parametrize("name", ADDED)
def test_a_line_too_many(name: str, bench: Bench) -> None:
    body, told = ADDED[name]
    path = bench.write(bench.text() + body + "\n")
    bench.refused(lambda: Engine(path), *told)
    assert not (bench.folder / "pwned").exists()


@pytest.mark.parametrize("name", REPLACED)
def test_a_wrong_line(name: str, bench: Bench) -> None:
    lines, told = REPLACED[name]
    path = bench.write(bench.text(**lines))
    bench.refused(lambda: Engine(path), *told, roads="validate plan train")


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_no_config(name: str, bench: Bench) -> None:
    content, told = WHOLE[name]
    path = bench.write(content)
    bench.refused(lambda: Engine(path), told, roads="validate")


def test_all_problems_are_told_at_once_whatever_their_kind(bench: Bench) -> None:
    text = bench.text(task="task: text-clasification", train="train: {epochs: -1, bach_size: 2}")
    path = bench.write(text + "trian: {}\nmethods:\n  - fmg\n  - lora: {r: x}\n  - fgm\n  - fgm\n")
    told = bench.refused(
        lambda: Engine(path, ["log.evry=2"]),
        "config.yaml:1: unknown task",
        "config.yaml:5: train.epochs",
        "config.yaml:5: unknown key 'train.bach_size'. Did you mean 'batch_size'?",
        "config.yaml:6: unknown key 'trian'",
        "config.yaml:8: unknown method 'fmg'",
        "config.yaml:9: methods.1.lora.r",
        "config.yaml:11: method 'fgm' is named twice",
        "override 'log.evry=2': unknown key 'log.evry'. Did you mean 'every'?",
    )
    code, out, err = call("validate", path, "log.evry=2")
    assert (code, out) == (2, "")
    assert err.splitlines() == [f"error: {line}" for line in told.splitlines()]


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_is_named_as_it_was_written(override: str, bench: Bench) -> None:
    path = bench.write(bench.text())
    bench.refused(lambda: Engine(path, [override]), OVERRIDES[override], roads="validate")


def test_an_override_of_a_file_value_hides_its_line(bench: Bench) -> None:
    path = bench.write(bench.text() + "methods:\n  - fgm\n  - pgd: {epsilon: -1}\n")
    told = bench.refused(lambda: Engine(path, ["methods=[{pgd: {epsilon: -2}}]"]), "got -2", roads="validate")
    assert "config.yaml" not in told


def test_a_config_that_cannot_be_read(bench: Bench) -> None:
    (bench.folder / "link.yaml").symlink_to("nowhere")
    for path, why in {"none.yaml": "No such file", ".": "Is a directory", "link.yaml": "No such file"}.items():
        bench.refused(lambda path=path: Engine(path), f"{Path(path)}: cannot be read ({why}", "pass the path of a YAML")


def test_cuda_where_there_is_none(bench: Bench) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = bench.write(bench.text(train="train: {device: cuda}"))
    bench.refused(lambda: Engine(path), "config.yaml:5: train.device is 'cuda'", "sees no GPU; use auto or cpu")


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ("[fgm, pgd]", ["'fgm' and 'pgd' cannot be combined", "remove 'fgm' or 'pgd'"]),
        ("[full, lora]", ["'full' and 'lora' cannot be combined"]),
        ("[maml]", ["'maml' needs 'episodes'", "add `episodes: {ways: N, shots: K}`"]),
        ("[rdrop]", ["'rdrop' needs 'dropout'", "use a model with dropout"]),
        ("[{lora: {targets: [nope]}}]", ["lora: no layer of this model is named 'nope'; its linear layers are"]),
        ("[{freeze: {patterns: ['nope.*']}}]", ["freeze: pattern 'nope.*' matches no parameter"]),
        ("[{class-weights: {weights: {postive: 2}}}]", ["class-weights", "'postive'"]),
        ("[{distill: {teacher: nowhere/at/all}}]", ["teacher: the folder nowhere/at/all does not exist"]),
    ],
)
def test_a_stack_that_does_not_fit(methods: str, told: list[str], bench: Bench) -> None:
    path = bench.write(bench.text() + f"methods: {methods}\n")
    bench.refused(lambda: Engine(path), *told)


@pytest.mark.parametrize("command", ["validate", "plan", "train"])
def test_the_command_line_says_the_same_and_writes_nothing(command: str, bench: Bench) -> None:
    before = None
    for body, told in list(ADDED.values())[:14]:
        path = bench.write(bench.text() + body + "\n")
        before = bench.snapshot()
        code, out, err = call(command, path)
        assert (code, out) == (2, "") and err.startswith("error: ")
        assert all(part in err for part in told)
        assert bench.snapshot() == before


def test_an_engine_can_try_again_once_the_file_is_mended(bench: Bench) -> None:
    rows = (bench.folder / "rows.jsonl").read_bytes()
    (bench.folder / "rows.jsonl").write_bytes(b"")
    engine = Engine(bench.write(bench.text()))
    bench.refused(lambda: engine, "rows.jsonl: holds no rows")
    (bench.folder / "rows.jsonl").write_bytes(rows)
    assert engine.validate()
