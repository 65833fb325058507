"""Checkpoints: safetensors and JSON, everything that exact resume needs, nothing that can run code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybridengine.errors import OutputError
from hybridengine.plugin.calling import Hooks
from hybridengine.run import Run
from hybridengine.stack.effects import EffectLog
from hybridengine.train.files import damage, replace_folder

__all__ = ["Checkpoints", "Progress", "write_tensors"]


@dataclass
class Progress:
    """What the loop itself remembers."""

    best_value: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    samples: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Checkpoints:
    """The `checkpoints/` folder of a run: save, prune, find the latest valid one, restore."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, run: Run, hooks: Hooks, effects: EffectLog, progress: Progress) -> Path:
        """Write a checkpoint of the present step, then drop the oldest beyond `keep`."""
        effects.flush()  # what methods reported since the last log line belongs to the checkpoint
        target = self.folder / f"step-{run.step:08d}"
        with replace_folder(target) as staging:
            write_tensors(staging / "parameters.safetensors", {k: p.detach() for k, p in run.may_optimise.items()})
            write_tensors(staging / "buffers.safetensors", _buffers(run))
            _write_optimizer(staging, run.optimizer)
            _write_states(staging, run.states)
            trainer = {
                "step": run.step,
                "stop_reason": run.stop_reason,
                "progress": progress.as_dict(),
                "loss_scale": run.loss_scale.state_dict(),
                "scheduler": _plain(run.scheduler.state_dict()) if run.scheduler is not None else None,
                "effects": effects.state_dict(),
            }
            (staging / "trainer.json").write_text(json.dumps(trainer), encoding="utf-8")
            hooks.notify("on_save", run, staging)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def steps(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def latest(self, run: Run) -> Path | None:
        """The newest checkpoint whose every file is as it was written; damaged ones are named and passed over."""
        for path in reversed(self.steps()):
            reason = damage(path)
            if reason is None:
                return path
            run.say(f"checkpoint {path.name} is damaged ({reason}); an earlier one is used")
        return None

    def restore(self, path: Path, run: Run, hooks: Hooks, effects: EffectLog) -> Progress:
        """Put a checkpoint's values into the built run.

        Raises:
            OutputError: damaged, or of another model or stack, naming the first difference.
        """
        if reason := damage(path):
            raise OutputError(f"checkpoint {path}: {reason}; resume from another one or set `resume: never`")
        trainer = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        _fill(run.may_optimise, load_file(path / "parameters.safetensors"), path, "parameter")
        _fill(_buffers(run), load_file(path / "buffers.safetensors"), path, "buffer")
        _read_optimizer(path, run.optimizer)
        _read_states(path, run)
        run.step = int(trainer["step"])
        run.stop_reason = trainer["stop_reason"]
        run.loss_scale.load_state_dict(trainer["loss_scale"])
        if run.scheduler is not None and trainer["scheduler"] is not None:
            run.scheduler.load_state_dict(trainer["scheduler"])
        effects.load_state_dict(trainer["effects"])
        hooks.notify("on_load", run, path)
        return Progress(**trainer["progress"])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors; of tied ones, which share storage and which safetensors refuses, contiguous copies."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        out[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    save_file(out, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors that a run goes on with, in torch's own memory.

    In that of the file they need not be aligned, and a matrix product with an unaligned factor may round otherwise.
    """
    return {name: value.clone() for name, value in load_file(path).items()}


def _buffers(run: Run) -> dict[str, Tensor]:
    """Persistent buffers of the model, and everything of the run modules that is neither optimised nor static."""
    found = {k: v for k, v in run.model.state_dict(keep_vars=True).items() if not isinstance(v, nn.Parameter)}
    for name, module in run.modules.items():
        if name not in run.static_modules:
            own = {f"{name}/{k}": v for k, v in module.state_dict(keep_vars=True).items()}
            found.update({k: v for k, v in own.items() if k not in run.may_optimise})
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path, kind: str) -> None:
    if targets.keys() != values.keys():
        name = sorted(targets.keys() ^ values.keys())[0]
        raise OutputError(
            f"checkpoint {path} is of another model or stack: {kind} {name!r} is on one side only; use the config it"
            " was made with, or another `output`"
        )
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != values[name].shape:
                raise OutputError(
                    f"checkpoint {path}: {kind} {name!r} has shape {tuple(values[name].shape)}, the model's has"
                    f" {tuple(target.shape)}"
                )
            target.copy_(values[name])


def _write_optimizer(folder: Path, optimizer: Any) -> None:
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                plain[f"{index}/{key}"] = value
    write_tensors(folder / "optimizer.safetensors", tensors)
    (folder / "optimizer.json").write_text(json.dumps({"plain": plain, "groups": _plain(state["param_groups"])}))


def _read_optimizer(folder: Path, optimizer: Any) -> None:
    saved = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**_read_tensors(folder / "optimizer.safetensors"), **saved["plain"]}.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, values in zip(groups, saved["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _write_states(folder: Path, states: Mapping[str, Mapping[str, Any]]) -> None:
    tensors, plain = {}, {}
    for method, values in states.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{method}/{key}"] = value
            else:
                plain[f"{method}/{key}"] = value
    write_tensors(folder / "states.safetensors", tensors)
    (folder / "states.json").write_text(json.dumps({"methods": list(states), "plain": plain}), encoding="utf-8")


def _read_states(folder: Path, run: Run) -> None:
    saved = json.loads((folder / "states.json").read_text(encoding="utf-8"))
    run.states.clear()
    for method in saved["methods"]:
        run.state(method)
    for name, value in {**_read_tensors(folder / "states.safetensors"), **saved["plain"]}.items():
        method, _, key = name.partition("/")
        run.state(method)[key] = value.to(run.device) if isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    """The JSON-able part of a state dict; callables (schedule functions) are rebuilt, not saved."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if not callable(v)]
    return value.item() if isinstance(value, Tensor) else value
