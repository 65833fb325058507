"""The engine computes the last layer where it is read, unless a method or a setting needs it whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridengine import Engine
from hybridengine.plugin import hook
from hybridengine.seams import Batch, Context, Out, View
from hybridengine.testing import tiny_checkpoint


@dataclass(eq=False)
class Reader:
    """Reads the hidden states of the pass it wraps."""

    @hook
    def wrap_loss(self, inner: Any, ctx: Context, batch: Batch, view: View) -> Out:
        states = ctx.outputs(batch, [view], features=True)[0].features
        assert states is not None
        ctx.report(self, size=states.square().mean())
        out: Out = inner(ctx, batch, view)
        return out


def engine(tmp_path: Path, *methods: object, **train: Any) -> Engine:
    folder = tiny_checkpoint(tmp_path / "model", num_labels=2, auto_class="AutoModelForSequenceClassification")
    rows = [{"text": f"good movie {i}", "label": "yes"} for i in range(12)]
    rows += [{"text": f"bad movie {i}", "label": "no"} for i in range(12)]
    config = {
        "task": "text-classification",
        "model": {"name": str(folder)},
        "data": {"train": rows, "validation": rows},
        "train": {"epochs": 1, "batch_size": 8, **train},
        "output": str(tmp_path / "run"),
    }
    return Engine(config, methods=methods)


def test_the_engine_shortens_where_no_method_reads_hidden_states(tmp_path: Path) -> None:
    plain = engine(tmp_path / "a").adapt()
    assert not plain.plan().features and plain._run.first_position is not None
    reading = engine(tmp_path / "b", Reader()).adapt()
    assert reading.plan().features and reading._run.first_position is None
    checkpointed = engine(tmp_path / "c", checkpointing=True).adapt()
    assert checkpointed._run.first_position is None
