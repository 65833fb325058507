"""LoRA through PEFT: low-rank updates of chosen linear layers, the backbone frozen."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hybridengine.errors import ModelError
from hybridengine.model import quiet
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import mix, seeded

__all__ = ["LoRA"]

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


@dataclass(eq=False)
class LoRA:
    """Trains low-rank updates of chosen layers, and new heads; the backbone keeps its pretrained values.

    Maths: W + (alpha/r)·B·A with A ∈ R^{r×in} random and B ∈ R^{out×r} zero, so that training starts at the
    pretrained function exactly; merging adds the product into W and gives the same outputs. At B = 0 the gradient of
    A is 0: the first step moves B alone.

    Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    Hooks: `transform_model`. Cost: no weight gradients of the backbone, about 2 of 3 of a plain step, and a small
    fraction of the optimizer's memory. Combines with everything but `full` and other adapters; embedding attacks work,
    since they perturb the embeddings' output.
    """

    name: ClassVar[str] = "lora"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        cost="about 2 of 3 of a plain step; optimizer memory for the adapters alone",
        paper="Hu et al. 2021, arXiv:2106.09685",
        combines="attacks, consistency, meta-learning, templates; not full",
    )

    r: int = parameter(8, "rank of the updates", ge=1)
    alpha: float = parameter(16, "scale: updates count alpha / r times", gt=0)
    dropout: float = parameter(0.0, "dropout on the input of the updates", ge=0, lt=1)
    targets: list[str] | None = parameter(None, "name endings of adapted layers; PEFT's choice, else all linear ones")
    heads: list[str] | None = parameter(None, "modules trained in full and saved; by default the task's head")

    def also_provides(self) -> tuple[str, ...]:
        """Dropout of its own lets `rdrop` work on models without any."""
        return ("dropout",) if self.dropout > 0 else ()

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the model by PEFT; the adapters' random start depends on the seed alone.

        Raises:
            ModelError: if a target names no layer of this model.
        """
        from peft import LoraConfig, get_peft_model

        heads = self._heads(run, model)
        targets = self._targets(model, heads)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=list(heads) or None,  # PEFT adds to the list it is given
            bias="none",
            task_type=next((t for end, t in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None),
            fan_in_fan_out=_transposed(model, targets),
        )
        with quiet(), seeded(torch.default_generator, mix(run.seed, "lora")):  # PEFT draws A from it
            adapted: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
        whole = f"; {', '.join(heads)} trained in full" if heads else ""
        run.say(f"lora: rank {self.r} on {_count(adapted)} layers{whole}")
        return adapted

    def _targets(self, model: Any, heads: list[str]) -> list[str]:
        linear = [name for name, module in model.named_modules() if _is_linear(module)]
        wanted = self.targets or _peft_choice(model)
        for ending in wanted if self.targets else ():
            if not any(_ends(name, ending) for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ModelError(f"lora: no layer of this model is named {ending!r}; its linear layers are: {known}")
        if any(_ends(name, ending) for name in linear for ending in wanted):
            return list(wanted)
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        above = [name for name in linear if any(name == head or name.startswith(f"{head}.") for head in heads)]
        chosen = [n for n in linear if n not in above and model.get_submodule(n) is not output]
        if not chosen:
            raise ModelError("lora: this model has no linear layer to adapt; remove `lora`")
        return chosen

    def _heads(self, run: Run, model: Any) -> list[str]:
        """The topmost modules that are all new: the task's head, and what the checkpoint lacks (a pooler).

        A pretrained language-model head is not among them: it is good as it is, and often tied to the embeddings.
        """
        if self.heads is not None:
            return list(self.heads)
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        new = set(run.missing_parameters)
        found: list[str] = []
        for name, module in model.named_modules():
            inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
            covered = any(name.startswith(f"{above}.") for above in found)
            pretrained_output = output in module.modules() and not new.issuperset(inside)
            if name and inside and not covered and not pretrained_output:
                if all(key in new or any(fnmatch.fnmatchcase(key, p) for p in run.task.head) for key in inside):
                    found.append(name)
        return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _peft_choice(model: Any) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as choices

    choice = choices.get(getattr(getattr(model, "config", None), "model_type", ""), [])
    return [] if isinstance(choice, str) else list(choice)


def _transposed(model: nn.Module, targets: list[str]) -> bool:
    """GPT2's Conv1D stores its weight the other way round."""
    found = [m for name, m in model.named_modules() if any(_ends(name, ending) for ending in targets)]
    return any(type(module).__name__ == "Conv1D" for module in found)


def _count(model: nn.Module) -> int:
    return sum(name.endswith("lora_A") for name, _ in model.named_modules())
