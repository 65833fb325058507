"""The offline report: what it says, what it survives, and that nothing in a run can become active in it."""

from __future__ import annotations

import ast
import copy
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import failed_run, finished_run, write_run

import hybridengine.report
from hybridengine.errors import OutputError
from hybridengine.report import write_report
from hybridengine.report.charts import COMPACT, WIDE, Series, line_chart, ticks
from hybridengine.report.read import clean, read_run
from hybridengine.report.stack import phase_rows
from hybridengine.report.tables import wrong_answers
from hybridengine.report.verdict import make_verdict
from hybridengine.report.words import compact, duration

HERE = Path(hybridengine.report.__file__).parent
FILES = ("config.yaml", "plan.json", "data_card.json", "metrics.jsonl", "summary.json", "predictions.jsonl")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
STYLE = re.compile(r"(left:-?[\d.]+%|width:-?[\d.]+%|flex-grow:[\d.]+|--v:[\d.]+(e-\d+)?)(;|$)")
ACTIVE_TAGS = {
    "script",
    "iframe",
    "object",
    "embed",
    "link",
    "base",
    "form",
    "input",
    "img",
    "image",
    "use",
    "foreignobject",
    "animate",
    "set",
    "video",
    "audio",
    "source",
    "template",
    "portal",
}
LINKS = {"src", "href", "xlink:href", "srcdoc", "action", "formaction", "data", "poster", "background", "ping"}


class Page(HTMLParser):
    """Tags with their attribute names, the visible text, and every offence against a page that must be inert."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.offences: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.open.append(tag)
        if tag in ACTIVE_TAGS:
            self.offences.append(f"<{tag}>")
        for name, value in attrs:
            value = value or ""
            here = name == "href" and tag == "a" and re.fullmatch(r"#[a-z]+", value)
            if name.startswith("on") or (name in LINKS and not here):
                self.offences.append(f"{tag} {name}={value}")
            if name == "style" and re.sub(STYLE, "", value):
                self.offences.append(f"{tag} style={value}")
            if tag == "meta" and name == "http-equiv" and value != "Content-Security-Policy":
                self.offences.append(f"meta {value}")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def report(folder: Path, files: dict[str, Any]) -> str:
    return write_report(write_run(folder, files)).read_text("utf-8")


@pytest.fixture
def finished(tmp_path: Path) -> Page:
    return Page(report(tmp_path / "first", finished_run()))


def test_a_finished_run_says_what_it_reached(finished: Page) -> None:
    assert (
        "The run finished. Its best checkpoint (step 388) reaches 91.2% accuracy on validation (95% interval 89.5% to"
        " 92.7%) and 90.4% on test (95% interval 88.6% to 92.1%). That is clearly better than always answering"
        " “positive” (53.5% on test)." in finished.text
    )
    assert finished.offences == []


@pytest.mark.parametrize(
    "words",
    [
        "share of the parameters being trained trainable_share 0.0065",  # effects in words
        "train 9,298 rows",
        "Cut at 64 tokens 1.8%",
        "2 rows of test have a text that train holds too.",
        "rating below 1 (2510)",
        "backward fgm one batch has added its gradient",  # the onion
        "at data, model, outputs or optimizer lora adamw",
        "1–582 lora, fgm, rdrop F 64 b F 64 B S 4.00×",  # phases
        "Learning rate",
        "Gradient norm, before clipping",
        "negative weakest 90.9% 89.9% 90.4% 542",  # per class
        "487 90%",  # confusion
        "Validation: 26 of 300 wrong. Test: 27 of 280 wrong.",
        "fgm: size of the change added to the embeddings, per text",  # effects over time
        "cross_entropy cuda not built: no nvcc was found",
        "Precision fp32 — this CPU has no bf16 instructions",
        "148,226 0.6% of 22.9 M",
        "Weights memory 91.4 MB Optimizer memory 1.2 MB",
        "Method Parameters Cost From adamw betas 0.9, 0.999 two numbers a parameter",
        "resume: auto",  # configuration
    ],
)
def test_a_finished_run_shows_every_section(finished: Page, words: str) -> None:
    assert words in finished.text


def test_a_failed_run_names_its_error_and_what_is_missing(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "intents", failed_run()))
    assert "The run failed after 1,240 of 3,000 steps." in page.text
    assert "loss is NaN on rows 411, 77, 1023" in page.text
    assert "Missing: data_card.json , predictions.jsonl" in page.text
    assert "metrics.jsonl: 1 line(s) could not be read" in page.text
    assert "gradual-unfreeze no effect" in page.text
    assert "401–1000 freelb, gradual-unfreeze ( F 32 b ) ×3 F 32 B S 4.00×" in page.text
    # 400 steps at 1× and 2,600 at 4×.
    assert "Cost of a step 3.60×" in page.text


@pytest.mark.parametrize("name", FILES)
def test_each_file_may_be_missing_or_broken(tmp_path: Path, name: str) -> None:
    files = finished_run()
    files.pop(name)
    assert f"Missing: {name}" in Page(report(tmp_path / "a", files)).text
    files[name] = '{"status": [1, 2'
    page = Page(report(tmp_path / "b", files))
    assert page.offences == [] and (name == "config.yaml" or f"{name}" in page.text.split("What each method did")[0])


def test_a_run_in_progress_is_judged_by_its_last_evaluation(tmp_path: Path) -> None:
    files = {
        key: value for key, value in finished_run().items() if key in ("plan.json", "metrics.jsonl", "config.yaml")
    }
    files["metrics.jsonl"] = [r for r in files["metrics.jsonl"] if r["step"] <= 300]
    text = Page(report(tmp_path, files)).text
    assert "The run has not finished: it wrote no summary after 300 of 582 steps." in text
    assert "The model reaches 90.0% accuracy on validation." in text


@pytest.mark.parametrize(
    ("accuracy", "interval", "words"),
    [
        (0.80, [0.75, 0.84], "clearly better than always answering “negative” (70.0% on test)"),
        (0.72, [0.68, 0.76], "above always answering “negative” (70.0% on test), but the difference may be chance"),
        (0.72, None, "above always answering “negative” (70.0% on test); no interval was recorded"),
        (0.70, [0.66, 0.74], "no better than always answering “negative” (70.0% on test)"),
    ],
)
def test_the_baseline_is_the_commonest_training_label(
    tmp_path: Path, accuracy: float, interval: list[float] | None, words: str
) -> None:
    per_class = {"positive": {"support": 30}, "negative": {"support": 70}}
    measured = {
        "main": "accuracy",
        "accuracy": accuracy,
        "ci95": interval,
        "per_class": per_class,
        "confusion": {"labels": []},
    }
    summary = {
        "status": "finished",
        "metrics": {"test": {**measured, "confusion": {"labels": ["positive", "negative"]}}},
    }
    card = {"splits": {"train": {"labels": {"positive": 10, "negative": 20}}}}
    run = read_run(write_run(tmp_path, {"summary.json": summary, "data_card.json": card}))
    assert words in make_verdict(run).sentence


def test_no_baseline_where_a_row_has_several_labels(tmp_path: Path) -> None:
    measured = {"main": "accuracy", "accuracy": 0.9, "per_class": {"a": {"support": 8}, "b": {"support": 7}}}
    files = {
        "summary.json": {"status": "finished", "metrics": {"test": measured}},
        "predictions.jsonl": [{"split": "test"}] * 10,
    }
    assert make_verdict(read_run(write_run(tmp_path, files))).results[0].baseline is None


@pytest.mark.parametrize("content", [None, {}, {"notes.txt": "hello"}])
def test_what_is_no_run_is_refused_with_a_way_out(tmp_path: Path, content: dict[str, str] | None) -> None:
    folder = tmp_path / "elsewhere"
    if content is not None:
        write_run(folder, content)
    with pytest.raises(OutputError, match=r"elsewhere.*`output` folder of a run"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    write_run(tmp_path, {"config.yaml": "task: x"})
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report.html: cannot be written"):
        write_report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "report.html"]


def test_the_page_is_reproducible_and_replaces_the_last_one(tmp_path: Path) -> None:
    first = report(tmp_path, finished_run())
    assert report(tmp_path, finished_run()) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*FILES, "report.html"))


def test_worst_errors_are_the_most_confident_wrong_answers(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = [
        {
            "split": "test",
            "row": i,
            "text": f"t{i}",
            "label": "a",
            "prediction": rng.choice("ab"),
            "probabilities": {"b": rng.random()},
        }
        for i in range(300)
    ]
    for row in rows:
        row["correct"] = row["prediction"] == "a"
    run = read_run(write_run(tmp_path, {"config.yaml": "task: x", "predictions.jsonl": rows}))
    wrong = sorted((r for r in rows if not r["correct"]), key=lambda r: -r["probabilities"]["b"])
    assert [item.row for item in wrong_answers(run)] == [str(r["row"]) for r in wrong[:20]]
    assert run.predictions.wrong == {"test": len(wrong)}


def test_wrong_tags_are_marked_in_the_sentence(tmp_path: Path) -> None:
    row = {
        "split": "test",
        "row": 4,
        "tokens": ["Mei", "lives", "in", "Kunming"],
        "label": ["B-PER", "O", "O", "B-LOC"],
        "prediction": ["B-PER", "O", "O", "O"],
        "correct": False,
    }
    text = Page(report(tmp_path, {"config.yaml": "task: x", "predictions.jsonl": [row]})).text
    assert "Mei lives in Kunming B-LOC → O" in text


def test_many_labels_become_a_list_of_confusions(tmp_path: Path) -> None:
    labels = [f"intent {i}" for i in range(60)]
    matrix = [[9 if i == j else 5 if (i, j) == (3, 8) else 0 for j in range(60)] for i in range(60)]
    measured = {"accuracy": 0.9, "confusion": {"labels": labels, "matrix": matrix}}
    page = Page(report(tmp_path, {"summary.json": {"status": "finished", "metrics": {"test": measured}}}))
    assert "60 labels: the commonest confusions. True Answer Rows Of the label intent 3 intent 8 5 35.7%" in page.text


# What must not happen ------------------------------------------------------------------------------------------------

_CODE = "alert(1)"
PAYLOADS = [
    f"<script>{_CODE}</script>",
    f"</script><script>{_CODE}</script>",
    f"</style><script>{_CODE}</script>",
    f"</title><script>{_CODE}</script>",
    f"</textarea><script>{_CODE}</script>",
    f"</pre><script>{_CODE}</script>",
    f"</svg><script>{_CODE}</script>",
    f"<svg><script>{_CODE}</script></svg>",
    f"--><script>{_CODE}</script>",
    f"]]><script>{_CODE}</script>",
    f"<img src=x onerror={_CODE}>",
    f'"><img src=x onerror={_CODE}>',
    f"'><img src=x onerror={_CODE}>",
    f'" onmouseover="{_CODE}',
    f"' onmouseover='{_CODE}",
    f"x onfocus={_CODE} autofocus",
    f"<svg onload={_CODE}>",
    f"<svg/onload={_CODE}>",
    f"<svg><animate onbegin={_CODE} attributeName=x>",
    f"<svg><set attributeName=href to=javascript:{_CODE}>",
    f"<svg><use href=data:image/svg+xml,{_CODE}>",
    f"<svg><foreignObject><body onload={_CODE}>",
    f"<math><mtext><img src onerror={_CODE}>",
    f"<body onload={_CODE}>",
    f"<details open ontoggle={_CODE}>",
    f"<video><source onerror={_CODE}>",
    f"<audio src=x onerror={_CODE}>",
    f"<input autofocus onfocus={_CODE}>",
    f"<select autofocus onfocus={_CODE}>",
    f"<marquee onstart={_CODE}>",
    f"<a href=javascript:{_CODE}>x</a>",
    f"javascript:{_CODE}",
    f"JaVaScRiPt&colon;{_CODE}",
    f"data:text/html,<script>{_CODE}",
    f"<iframe src=javascript:{_CODE}>",
    f'<iframe srcdoc="<script>{_CODE}</script>">',
    "<object data=//evil.example>",
    "<embed src=//evil.example>",
    "<link rel=stylesheet href=//evil.example>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<style>@import '//evil.example'</style>",
    "x;background:url(//evil.example)",
    f"expression({_CODE})",
    f"<form action=javascript:{_CODE}><button>x</button></form>",
    f"<template><script>{_CODE}</script></template>",
    "{{ 7 * 7 }}",
    "{% include '/etc/passwd' %}",
    f"&lt;script&gt;{_CODE}&lt;/script&gt;",
    f"&#60;script&#62;{_CODE}",
    f"<scr\x00ipt>{_CODE}</scr\x00ipt>",
    f"\x1b]0;title\x07<b onclick={_CODE}>",
    f"\x1b[2J<u onclick={_CODE}>",
]


def hostile(word: str) -> dict[str, Any]:
    """A run that carries `word` in every place where a user, a file or a plugin can put one."""
    files = finished_run()
    summary, plan, card = files["summary.json"], files["plan.json"], files["data_card.json"]
    for key in ("stop_reason", "error", "task", "model", "output", "device", "data_source"):
        summary[key] = word
    summary["status"] = "failed"
    summary["precision"] = {"name": word, "reason": word}
    summary["notes"], summary["versions"], summary["skipped_rows"] = [word], {word: word}, {word: {word: 3}}
    summary["methods"] = {word: {word: {"mean": 1.0, "last": 1.0, "count": 2}}}
    summary["kernels"] = {word: {word: 1}}
    measured = {
        "main": word,
        word: 0.5,
        "ci95": [0.4, 0.6],
        "confusion": {"labels": [word, "b"], "matrix": [[3, 1], [1, 2]]},
        "per_class": {word: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 4}, "b": {"f1": 0.6, "support": 3}},
    }
    summary["metrics"] = {
        word: measured,
        "test": {
            "main": "accuracy",
            "accuracy": 0.9,
            "ci95": [0.8, 1.0],
            **{k: measured[k] for k in ("confusion", "per_class")},
        },
    }
    plan["layers"] = {seam: [word] for seam in ("step", "gradient", "backward", "loss", "predict")}
    plan["phases"] = [{"start": 0, "active": [word], "passes": f"<{word}", "relative_cost": 1, "sync_points": word}] * 2
    plan["members"] = [{"name": word, "parameters": {word: word}, "cost": word, "distribution": word, "version": word}]
    plan["kernels"] = [{"op": word, "impl": word, "available": False, "reason": word, "chosen": True}]
    plan["memory"] = {f"{word}_bytes": 5}
    plan["members"].append({"name": f"other {word}", "parameters": {word: word}, "cost": word, "version": word})
    card["splits"] = {word: {"rows": 3, "source": word, "labels": {word: 3}, "words": {"median": 1}}}
    card.update(
        {
            "overlap": {f"{word}/test": 1},
            "carved": {word: 0.1},
            "carve_rule": word,
            "inferred": {word: {word: word}},
            "skipped": {word: {word: 1}},
            word: word,
        }
    )
    record = {"kind": "train", "loss": 1.0, "terms": {word: 1.0, "b": 2.0}, "lr": 1e-4, "effects": {word: {word: 1.0}}}
    files["metrics.jsonl"] = [
        *({**record, "step": step} for step in (1, 2)),
        {"kind": "validation", "step": 2, "metrics": {f"accuracy {word}": 0.5, word: 1.0}},
    ]
    row = {
        "split": word,
        "row": word,
        "label": word,
        "prediction": word,
        "probabilities": {word: 0.9},
        "correct": False,
    }
    files["predictions.jsonl"] = [
        {**row, "text": word, word: word},
        {**row, "tokens": [word], "label": [word], "prediction": ["O"]},
    ]
    files["config.yaml"] = f"task: {word}\n"
    return files


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report(tmp_path_factory.mktemp("harmless"), hostile("word")))


def test_there_are_fifty_payloads() -> None:
    assert len(set(PAYLOADS)) >= 50


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_becomes_markup(tmp_path: Path, harmless: Page, payload: str) -> None:
    """The page has the very tags and attributes that a harmless word gives, and shows the payload as text."""
    name = clean(payload).replace("/", "_").strip(".")
    html = report(tmp_path / name, hostile(payload))
    page = Page(html)
    assert page.offences == []
    assert page.tags == harmless.tags
    assert not CONTROLS.search(html)
    shown = " ".join(clean(payload).split())
    # Title, heading, status line, verdict, tables, diagram, charts, errors, config, ...: more than fifty places.
    assert page.text.count(shown) >= 50


def test_the_policy_forbids_everything_but_inline_style(tmp_path: Path) -> None:
    html = report(tmp_path, finished_run())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy and policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert html.index(policy[0]) < html.index("<style>")
    assert not re.search(r"url\(|@import|https?:", (HERE / "style.css").read_text("utf-8"))


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(PAYLOADS),
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = _with(value[path[0]], path[1:], new)
    return value


_SMALL = {**finished_run(), "predictions.jsonl": finished_run()["predictions.jsonl"][:6]}
_SMALL["metrics.jsonl"] = _SMALL["metrics.jsonl"][:3] + _SMALL["metrics.jsonl"][-3:]
_PLACES = [place for place in _places(_SMALL) if len(place) > 1]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(_PLACES), _JSON), min_size=1, max_size=4))
def test_any_value_anywhere_is_survived(tmp_path: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    files: Any = _SMALL
    for place, value in changes:
        try:
            files = _with(files, place, value)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
    html = report(tmp_path, files)
    assert Page(html).offences == []
    assert not CONTROLS.search(html)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.binary(max_size=60))
def test_any_bytes_in_a_file_are_survived(tmp_path: Path, name: str, content: bytes) -> None:
    write_run(tmp_path, _SMALL)
    (tmp_path / name).write_bytes(content)
    assert Page(write_report(tmp_path).read_text("utf-8")).offences == []


# Charts and numbers --------------------------------------------------------------------------------------------------


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 8))
def test_ticks_are_round_and_in_range(low: float, size: float, most: int) -> None:
    high = low + size
    if high - low < abs(low) * 1e-6:
        return
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most + 1 and found == sorted(set(found))
    slack = (high - low) * 1e-6  # ticks are rounded to 12 significant digits, so a range of 1e-6 of its place keeps 6
    assert all(low - slack <= tick <= high + slack for tick in found)
    if len(found) > 2:
        step = found[1] - found[0]
        digit = step / 10 ** math.floor(math.log10(step * (1 + 1e-5)))
        assert min(abs(digit - d) for d in (1, 2, 5)) < 1e-4


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=700), st.booleans())
def test_charts_stay_in_their_frame(values: list[float], noisy: bool) -> None:
    chart = line_chart("k", "t", [Series("s", list(enumerate(values)), noisy=noisy)])
    drawable = [v for v in values if abs(v) < 1e30]
    assert (chart is None) == (not drawable)
    if chart is None:
        return
    for line in chart.lines:
        for path in line.paths + line.faint:
            for x, y in (map(float, point.split(",")) for point in path.split()):
                assert WIDE.left <= x <= WIDE.right_edge and WIDE.top <= y <= WIDE.bottom_edge
    assert chart.lines[0].last == compact(drawable[-1])


def test_spikes_survive_thinning_and_gaps_stay_gaps() -> None:
    values = [1.0] * 5000
    values[1234], values[3000] = 9.0, math.nan
    chart = line_chart("k", "t", [Series("s", list(enumerate(values)))])
    assert chart is not None
    line = chart.lines[0]
    assert len(line.paths) == 2
    points = [tuple(map(float, p.split(","))) for path in line.paths for p in path.split()]
    assert len(points) <= 260
    low, high = 1.0 - 8 * 0.06, 9.0 + 8 * 0.06  # the range is padded by 6% on both sides
    top = WIDE.bottom_edge - (9.0 - low) / (high - low) * (WIDE.bottom_edge - WIDE.top)
    assert min(y for _, y in points) == pytest.approx(top, abs=0.06)  # coordinates have one decimal
    assert COMPACT.width < WIDE.width


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    steps = [(10, 5.0), (20, 4.0), (10, 3.0), (20, 2.0), (30, 1.0)]
    files = {"metrics.jsonl": [{"kind": "train", "step": step, "loss": loss} for step, loss in steps]}
    assert "training loss goes from 3 at step 10 to 1 at step 30." in Page(report(tmp_path, files)).text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.0412, "0.0412"),
        (0.00019, "1.9e-4"),
        (1e-4, "1e-4"),
        (1234.5, "1,234"),
        (22.25, "22.25"),
        (3.2e8, "3.2e8"),
        (-0.5, "-0.5"),
        (99.999, "100"),
    ],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert compact(value) == shown


def test_durations_are_in_words() -> None:
    assert [duration(s) for s in (3.21, 59.96, 262.4, 4031, None)] == [
        "3.2 s",
        "1 min 0 s",
        "4 min 22 s",
        "1 h 7 min",
        "–",
    ]


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", [0, 1])
def test_text_meets_the_contrast_rule_in_both_themes(theme: int) -> None:
    """WCAG 2 AA: at least 4.5 between text and what it stands on."""
    blocks = re.findall(r":root \{(.*?)\}", (HERE / "style.css").read_text("utf-8"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[theme]))
    pairs = [
        ("ink", "bg"),
        ("ink", "card"),
        ("soft", "bg"),
        ("soft", "card"),
        ("accent", "accent-soft"),
        ("good", "good-soft"),
        ("warn", "warn-soft"),
        ("warn", "bg"),
        ("bad", "bad-soft"),
        ("bad", "card"),
        ("ink", "right"),
        ("ink", "off"),
    ]
    for text, ground in pairs:
        one, two = sorted((_luminance(colours[text]), _luminance(colours[ground])))
        assert (two + 0.05) / (one + 0.05) >= 4.5, (text, ground)


def test_the_report_needs_no_torch() -> None:
    """It reads a folder and must answer at once: standard library, jinja2, the errors and atomic writes alone."""
    allowed = {*sys.stdlib_module_names, "jinja2"}
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith(
                    ("hybridengine.errors", "hybridengine.report", "hybridengine.train.files")
                ), name
    code = "import sys, hybridengine.report; print(json.dumps(sorted(sys.modules)))".replace(
        "import sys,", "import sys, json,"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(loaded)


def test_steps_that_take_turns_are_shown_as_one_period() -> None:
    plan = {"total_steps": 10, "phases": [{"start": 0, "passes": "F4 B W (F4 B S) x2", "turns": [{"F": 2}, {"F": 1}]}]}
    folder = SimpleNamespace(plan=plan)
    (row,) = phase_rows(folder)  # type: ignore[arg-type]
    assert row.period == 2 and row.share == 100
    assert [chip.kind for chip in row.chips] == [*"FBW(FBS)"]
