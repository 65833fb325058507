"""The tables and the page of a benchmark: every figure is told once, and what was not run says so."""

from __future__ import annotations

import copy
import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from hybridengine.bench.bars import bar_chart, steps
from hybridengine.bench.case import OURS
from hybridengine.bench.page import render
from hybridengine.bench.table import columns, digits, left_out, legend, setting, size, table

VOID = {"meta", "br", "link", "img"}
COORDINATES = ("x", "y", "x1", "x2", "y1", "y2", "width", "height")


def figures(median: float, **more: Any) -> dict[str, Any]:
    return {
        "median_ms": median,
        "q1_ms": median * 0.9,
        "q3_ms": median * 1.2,
        "rounds": 7,
        "times_ours": median / 2.0,
        "peak_bytes": 5_000_000,
        "result_bytes": 3_000_000,
        "extra_bytes": 2_000_000,
        "error": 1.5e-7,
        "wrong": False,
        "share_of_floor": 0.5,
        **more,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    variants = {
        OURS: figures(2.0),
        "torch": figures(15.0, extra_bytes=40_000_000),
        "compile": figures(6.0, wrong=True, error=0.9),
        "liger": {"not_run": "it needs a GPU"},
    }
    other = {OURS: figures(2.0), "torch": figures(1.0), "compile": {"not_run": "RuntimeError: <b>no</b>"}}
    rows = [
        {"op": "cross_entropy", "case": "fp32 512 x 30,522", "variants": variants, "foreign_cpu_share": 0.3},
        {"op": "cross_entropy", "case": "fp32 4 x 2", "variants": other, "foreign_cpu_share": 0.1},
        {"op": "cross_entropy", "case": "fp32 huge", "not_run": "it needs about 90.0 GB", "variants": {}},
        {"op": "gelu", "case": "fp32 8 x 8", "variants": {OURS: figures(2.0)}, "foreign_cpu_share": None},
    ]
    machine = {
        "device": "Some <CPU>",
        "kind": "cpu",
        "isa": "avx2",
        "native_library": "loaded",
        "threads": 2,
        "processors": 4,
        "load_average": [0.5, 0.4, 0.3],
        "load_average_after": [1.5, 0.4, 0.3],
        "python": "3.11.7",
        "system": "Linux",
        "versions": {"torch": "2.13.0", "quack-kernels": None},
        "cuda": None,
        "allocator": {"THP_MEM_ALLOC_ENABLE": None, "pool_limit_bytes": 5},
        "settings": {},
    }
    floor = {"copy_gb_per_s": 12.5, "products_gflop_per_s": {"float32": 140.0}}
    return {
        "date": "2026-01-01T00:00Z",
        "against": ["torch", "compile", "liger"],
        "machine": machine,
        "memory": "VmHWM",
        "not_run": {"kl_pair": "hybridengine.kernels has no kl_pair"},
        "rows": rows,
        "floor": floor,
    }


class Page(HTMLParser):
    """Tags that are open, ids, links, and numbers of the drawings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.boxes: list[tuple[float, float]] = []
        self.drawn: list[dict[str, float]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        if tag == "svg":
            self.boxes.append(tuple(map(float, (found["viewbox"] or "").split()[2:])))  # type: ignore[arg-type]
        if "svg" in self.open:
            self.drawn.append({n: float(v or "nan") for n, v in attrs if n in COORDINATES} | {"box": len(self.boxes)})
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes itself in SVG alone"
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_page_is_whole_and_loads_nothing(report: dict[str, Any]) -> None:
    html = render(report)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "default-src 'none'" in html and "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert "Some <CPU>" in page.text and "<CPU>" not in html  # escaped


def test_bars_lie_inside_their_drawing(report: dict[str, Any]) -> None:
    page = Page(render(report))
    assert len(page.boxes) == 2
    for one in page.drawn:
        width, height = page.boxes[int(one.pop("box")) - 1]
        right = one.get("x", 0.0) + one.get("width", 0.0)
        bottom = one.get("y", 0.0) + one.get("height", 0.0)
        assert 0 <= right <= width and 0 <= bottom <= height
        assert all(value >= 0 for value in one.values())


def test_the_page_has_every_number_in_a_table(report: dict[str, Any]) -> None:
    text = " ".join(Page(render(report)).text.split())
    for told in ("15.0", "13.5 to 18.0", "7.50x", "40.0 MB", "50.0%", "9.0e-01 wrong", "12.5 GB/s", "140 GFLOP/s"):
        assert told in text, told
    assert "not run: RuntimeError: <b>no</b>" in text and "not run: it needs about 90.0 GB" in text
    assert "not run: liger: it needs a GPU" in text
    assert "Best 7.50x cross_entropy fp32 512 x 30,522" in text and "Worst 0.500x" in text
    assert "Other processes took 20% of a CPU" in text


def test_a_page_of_nothing_can_be_made(report: dict[str, Any]) -> None:
    assert "Kernels on" in render(report | {"rows": []})


def test_the_table_tells_ratios_memory_and_what_was_not_run(report: dict[str, Any]) -> None:
    rows = report["rows"][:3]
    assert columns(rows) == [OURS, "torch", "compile"]
    heads, cells = table(rows)
    assert heads[:4] == ["case", "ours ms", "torch takes", "compile takes"]
    assert cells[0] == ["fp32 512 x 30,522", "2.00", "7.50x", "3.00x!", "2.0 MB", "0.05", "50%", "1.5e-07"]
    assert cells[1][2:4] == ["0.500x", "not run"]
    assert cells[2] == ["fp32 huge", "not run", "", "", "", "", "", ""]
    assert all(len(one) == len(heads) for one in cells)


def test_lines_say_who_was_not_run_and_why(report: dict[str, Any]) -> None:
    assert list(left_out(report)) == [
        "not run: kl_pair: hybridengine.kernels has no kl_pair",
        "not run: liger: it needs a GPU",
        "not run: compile: RuntimeError: <b>no</b> (cross_entropy fp32 4 x 2)",
        "not run: it needs about 90.0 GB (cross_entropy fp32 huge)",
    ]
    told = "\n".join([*setting(report), *legend(report)])
    assert "avx2, 2 threads" in told and "THP_MEM_ALLOC_ENABLE is not set" in told
    assert "wrong by more than 5%" in told and "other processes took 20%" in told


def test_a_quiet_machine_is_not_called_busy(report: dict[str, Any]) -> None:
    quiet = copy.deepcopy(report)
    for row in quiet["rows"]:
        row["foreign_cpu_share"] = 0.01
    assert "other processes" not in "\n".join(legend(quiet))


@pytest.mark.parametrize(
    ("value", "told"), [(0.01234, "0.0123"), (1.0, "1.00"), (24.17, "24.2"), (1204.4, "1,204"), (0.0, "0")]
)
def test_numbers_have_three_digits(value: float, told: str) -> None:
    assert digits(value) == told


def test_sizes() -> None:
    assert [size(value) for value in (0, 2_500_000, 3_210_000_000, None)] == [
        "0.0 MB",
        "2.5 MB",
        "3.21 GB",
        "not measured",
    ]


@pytest.mark.parametrize("most", [1.02, 3.0, 7.6, 24.0, 980.0])
def test_the_axis_has_few_round_steps_from_zero(most: float) -> None:
    found = steps(most)
    assert found[0] == 0 and 3 <= len(found) <= 7 and found[-1] <= most
    assert len({round(b - a, 9) for a, b in itertools.pairwise(found)}) == 1


def test_a_competitor_that_a_case_does_not_have_takes_no_place() -> None:
    chart = bar_chart(
        "k", "t", ["a", "b", "c"], [("one", {"a": 2.0, "c": None}), ("two", {"a": 1.0, "b": 3.0, "c": 1.0})]
    )
    assert chart is not None
    assert [[bar.name for bar in group.bars] for group in chart.groups] == [["a", "c"], ["a", "b", "c"]]
    assert chart.groups[0].bars[1].length is None and "not run" in chart.groups[0].bars[1].text
    assert bar_chart("k", "t", ["a"], [("one", {"a": None})]) is None
    assert re.search("2.00 times as fast as torch, for one", chart.description)
