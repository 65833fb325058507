"""Any other adapter of PEFT by its name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hybridengine.errors import ConfigError, ModelError, did_you_mean
from hybridengine.model import linear_targets, new_heads, task_type, transposed, wrap_by_peft
from hybridengine.plugin import Band, Run, StackView, Traits, hook, parameter

__all__ = ["Peft"]

_LORA_CHOICES = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
_OURS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_OURS |= {"inference_mode", "modules_to_save", "fan_in_fan_out", "target_modules"}
_REASONS = {
    "ADALORA": "it moves ranks between layers in calls after each step, which this engine does not make",
    "POLY": "it needs the number of a task with every batch",
    "XLORA": "it mixes adapters that were trained before",
    "ADAPTION_PROMPT": "it is a prompt inside the attention of Llama alone",
    "TRAINABLE_TOKENS": "it trains chosen rows of the embedding, which no option names by text",
    "SHADOW": "it trains a second model beside the first",
}


@dataclass(eq=False)
class Peft:
    """Adapts the model by any adapter that PEFT has: `kind` names it (OFT, LoHa, LoKr, FourierFT, BOFT, HRA, ...).

    Maths, paper and start are those of the kind; `options` are the fields of PEFT's config for it. The layers are
    PEFT's choice for LoRA, else all linear ones below the head; the head is trained in full.

    Paper: Mangrulkar et al. 2022, "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods" (the library).
    Hooks: `check_stack`, `transform_model`. Cost: about 2 of 3 of a plain step, more with kinds that rotate whole
    matrices. Combines with everything but `full` and other adapters.
    """

    name: ClassVar[str] = "peft"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        cost="about 2 of 3 of a plain step; optimizer memory for the adapters alone",
        paper="Mangrulkar et al. 2022, https://github.com/huggingface/peft",
        combines="attacks, consistency, templates; not full",
    )

    kind: str = parameter(help="PEFT's name of the adapter, in any case", example="OFT", min_length=1)
    options: dict[str, Any] = parameter(dict, "fields of PEFT's config of that kind, e.g. {r: 8}")
    targets: list[str] | None = parameter(None, "name endings of adapted layers; PEFT's choice, else all linear ones")
    heads: list[str] | None = parameter(None, "modules trained in full and saved; by default the task's head")

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """The kind must exist, be an adapter, and have these options."""
        return self._problems()

    def _problems(self) -> list[str]:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING as configs
        from peft import PromptLearningConfig

        by_name = {str(key.value): config for key, config in configs.items()}
        adapters = [k for k, c in by_name.items() if k not in _REASONS and not issubclass(c, PromptLearningConfig)]
        kind = self.kind.upper()
        if kind in _REASONS:
            return [f"peft: kind {self.kind!r} cannot be used: {_REASONS[kind]}; use one of {', '.join(adapters)}"]
        if kind not in by_name:
            return [f"peft: no kind {self.kind!r}.{did_you_mean(kind, adapters)} Give one of {', '.join(adapters)}"]
        if kind not in adapters:
            return [f"peft: kind {self.kind!r} is a prompt, not an adapter; use one of {', '.join(adapters)}"]
        fields = sorted({f.name for f in dataclasses.fields(by_name[kind]) if f.init} - _OURS)
        found = [
            f"peft: {kind} has no option {option!r}.{did_you_mean(option, fields)} Remove it from `options`"
            if option not in _OURS
            else f"peft: option {option!r} is set by the engine; remove it from `options` (layers: `targets`)"
            for option in self.options
            if option not in fields
        ]
        return found

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the model by PEFT.

        Raises:
            ConfigError: options that this kind does not take.
            ModelError: a target names no layer, or PEFT cannot adapt this model so.
        """
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        if problems := self._problems():
            raise ConfigError(problems)
        kind = self.kind.upper()
        cls = next(config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(key.value) == kind)
        fields = {f.name for f in dataclasses.fields(cls)}
        heads = new_heads(run, model, self.heads)
        values = self._values(model, kind, heads)
        try:
            config = cls(**{k: v for k, v in values.items() if k in fields}, **self.options)
            adapted = wrap_by_peft(run, model, f"peft {kind}", config)
        # How PEFT's kinds refuse: no such option, a wrong value, a layer they cannot adapt, a package that is missing.
        except (TypeError, ValueError, NotImplementedError, AssertionError, ImportError) as error:
            raise ModelError(
                f"peft: {kind} cannot adapt this model with {self.options}: {error}; change `options` or `targets`,"
                " or use another kind"
            ) from error
        whole = f"; {', '.join(heads)} trained in full" if heads else ""
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        run.say(f"peft: {kind} with {trained:,} trained parameters{whole}")
        return adapted

    def _values(self, model: nn.Module, kind: str, heads: list[str]) -> dict[str, Any]:
        """What the engine knows: layers, heads, the model's use; kinds take what their config has of it."""
        import peft.utils

        table = f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING"
        values: dict[str, Any] = {"modules_to_save": list(heads) or None, "task_type": task_type(model)}
        if kind == "LN_TUNING":
            norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
            values["target_modules"] = self.targets or norms
        else:
            chosen = table if hasattr(peft.utils, table) else _LORA_CHOICES
            values["target_modules"] = linear_targets(model, heads, self.targets, chosen, "peft")
            values["fan_in_fan_out"] = transposed(model, values["target_modules"])
        return values
