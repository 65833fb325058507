"""Put the page together and write it."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from hybridengine.report.curves import effect_charts, training_charts
from hybridengine.report.facts import data_notes, environment, figures, split_cards
from hybridengine.report.read import RunFolder, clean, read_run, sequence, text
from hybridengine.report.stack import kernel_rows, layers, method_rows, outside, phase_rows, used_passes
from hybridengine.report.tables import class_tables, confusions, metric_rows, wrong_answers
from hybridengine.report.verdict import make_verdict
from hybridengine.report.words import percent, title
from hybridengine.train.files import write_text

__all__ = ["render", "write_report"]

NAME = "report.html"


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds, and return its path.

    The page stands alone: no script, no remote asset. Missing or broken files of the run are named in it.

    Raises:
        OutputError: if the folder is no run folder, or the page cannot be written.
    """
    folder = Path(folder)
    page = render(read_run(folder))
    target = folder / NAME
    write_text(target, page)
    return target


def render(run: RunFolder) -> str:
    """The page as one HTML string; every value is escaped, none can become markup."""
    (nested, predict), (metric_splits, metrics) = layers(run), metric_rows(run)
    phases = phase_rows(run)
    template = _pages().get_template("page.html.j2")
    return template.render(
        name=clean(run.path.resolve().name),
        run=run,
        task=text(run.summary.get("task")),
        model=text(run.summary.get("model")),
        verdict=make_verdict(run),
        figures=figures(run),
        methods=method_rows(run),
        splits=split_cards(run),
        data_notes=data_notes(run),
        layers=nested,
        predict=predict,
        outside=outside(run),
        phases=phases,
        passes=used_passes(phases),
        rows_per_step=text(run.plan.get("rows_per_step")),
        stack_views=bool(run.plan.get("stack_views")),
        charts=training_charts(run),
        effects=effect_charts(run),
        metric_splits=metric_splits,
        metrics=metrics,
        classes=class_tables(run),
        confusions=confusions(run),
        wrong=wrong_answers(run),
        wrong_counts=[(s, n, run.predictions.rows[s]) for s, n in run.predictions.wrong.items()],
        kernels=kernel_rows(run),
        environment=environment(run),
        notes=[text(note) for note in sequence(run.summary.get("notes"))],
    )


@functools.cache
def _pages() -> jinja2.Environment:
    """The templates, compiled once."""
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("hybridengine", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(percent=percent, title=title)
    return pages
