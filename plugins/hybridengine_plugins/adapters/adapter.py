"""Bottleneck adapters: small modules behind the sublayers of a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError
from hybridengine.model import layer_stacks, named, new_heads
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Context, Work, mix, override_forward, seeded

__all__ = ["Adapter"]

# What the families call the layer whose output is a sublayer's: what the residual connection adds to.
_ATTENTION = (
    "attention.output.dense", "crossattention.output.dense", "attention.out_lin", "attention.attn.o", "attention.dense",
    "self_attention.dense", "self_attn.dense", "self_attn.o_proj", "self_attn.out_proj", "encoder_attn.out_proj",
    "SelfAttention.o", "EncDecAttention.o", "attn.c_proj", "crossattention.c_proj", "attn.out_proj",
    "attn.attention.out_proj", "attn.Wo",
)  # fmt: skip
_FEED_FORWARD = (
    "output.dense", "ffn.lin2", "ffn_output", "mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "fc2",
    "mlp.Wo", "DenseReluDense.wo",
)  # fmt: skip
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class Bottleneck(nn.Module):
    """h + U f(D h + b) + c over states `[..., width]`; U and c start at zero, so it starts as the identity."""

    def __init__(self, width: int, size: int, activation: str, std: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation = activation
        nn.init.normal_(self.down.weight, std=std)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, states: Tensor) -> Tensor:
        """Of the shape of `states`."""
        change: Tensor = self.up(_ACTIVATIONS[self.activation](self.down(states)))
        return states + change


@dataclass(eq=False)
class Adapter:
    """Puts a small module behind the sublayers and trains it, and new heads; the backbone keeps its values.

    Maths: a sublayer's output h becomes h + U f(D h + b) + c before the residual connection adds it, D ∈ R^{size×d}
    random and small, U and c zero, so that training starts at the pretrained function exactly. `houlsby` places one
    behind attention (cross-attention too) and one behind the feed-forward block, `pfeiffer` the latter alone: half the
    parameters, nearly the same results. They stand at the projection that ends the sublayer; its dropout follows.

    Paper: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Pfeiffer et al. 2021, "AdapterFusion".
    Hooks: `transform_model`, `wrap_step`. Cost: no weight gradients of the backbone, about 2 of 3 of a plain step, and
    the modules themselves, also when predicting: unlike `lora` they cannot be merged. Combines with everything but
    `full` and other adapters; rates as for `lora`, 1e-4 to 1e-3.
    """

    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        provides=("added_modules",),
        effect="up_norm",
        cost="about 2 of 3 of a plain step; optimizer memory for the adapters alone",
        paper="Houlsby et al. 2019, arXiv:1902.00751",
        combines="attacks, consistency, meta-learning, templates; not full",
    )

    placement: Literal["houlsby", "pfeiffer"] = parameter(
        "houlsby", "behind attention and feed-forward blocks, or behind the latter alone"
    )
    size: int = parameter(64, "width of the bottleneck", ge=1)
    activation: Literal["gelu", "relu", "silu", "tanh"] = parameter("gelu", "between the two projections")
    std: float = parameter(0.01, "spread of the random down-projection", gt=0)
    attention: list[str] | None = parameter(None, "name endings of attention's output layers; known ones by default")
    feedforward: list[str] | None = parameter(None, "those of the feed-forward blocks")
    heads: list[str] | None = parameter(None, "modules trained in full and saved; by default the task's head")
    _added: list[Bottleneck] = field(default_factory=list, init=False, repr=False)

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Freeze the model but for its heads and insert the modules; their random start depends on the seed alone.

        Raises:
            ModelError: a layer has no such output layer, or a head does not exist.
        """
        heads = new_heads(run, model, self.heads)
        modules = dict(model.named_modules())
        if missing := [head for head in heads if head not in modules]:
            raise ModelError(f"adapter: this model has no module {missing[0]!r}; change `heads`")
        places = self._places(model)
        model.requires_grad_(False)
        for head in heads:
            modules[head].requires_grad_(True)
        with seeded(torch.default_generator, mix(run.seed, "adapter")):
            self._added = [_insert(modules[place], self) for place in places]
        whole = f"; {', '.join(heads)} trained in full" if heads else ""
        run.say(f"adapter: {self.placement}, {len(places)} modules of width {self.size}{whole}")
        return model

    def _places(self, model: nn.Module) -> list[str]:
        """Names of the output layers, from the bottom up."""
        attention, feedforward = self.attention or _ATTENTION, self.feedforward or _FEED_FORWARD
        found: list[str] = []
        for stack, layers in layer_stacks(model).items():
            for number, layer in enumerate(layers):
                name = f"{stack}.{number}"
                linear = [f"{name}.{key}" for key, module in layer.named_modules() if _width(module)]
                behind = [key for key in linear if any(named([key], ending) for ending in attention)]
                others = [key for key in linear if key not in behind]
                after = [key for key in others if any(named([key], ending) for ending in feedforward)]
                if not behind and self.placement == "houlsby":
                    raise ModelError(_not_found("attention", name, layer, attention, linear))
                if not after:
                    raise ModelError(_not_found("feedforward", name, layer, feedforward, linear))
                found += [key for key in linear if key in after or (key in behind and self.placement == "houlsby")]
        if not found:
            raise ModelError("adapter: this model has no stack of layers (an nn.ModuleList); use lora")
        return found

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Tell how far the up-projections have come from zero: modules that nothing calls would stay there."""
        terms = inner(ctx, works)
        norm = torch.nn.utils.get_total_norm([module.up.weight.detach() for module in self._added])
        ctx.report(self, up_norm=norm)
        return terms


def _insert(layer: Any, method: Adapter) -> Bottleneck:
    """Make the layer's output go through a module of its own, which the layer holds by the name `adapter`."""
    module = Bottleneck(_width(layer), method.size, method.activation, method.std).to(layer.weight)
    layer.add_module("adapter", module)

    def wrap(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda layer, states: layer.adapter(forward(layer, states))

    override_forward(layer, wrap)
    return module


def _width(module: Any) -> int:
    """Width of a linear layer's output; 0 for other modules."""
    if type(module).__name__ == "Conv1D":  # GPT2's, which holds its weights the other way round
        return int(module.nf)
    return module.out_features if isinstance(module, nn.Linear) else 0


def _not_found(option: str, name: str, layer: nn.Module, endings: Sequence[str], linear: Sequence[str]) -> str:
    inside = ", ".join(key.removeprefix(f"{name}.") for key in linear) or "none"
    return (
        f"adapter: {name} ({type(layer).__name__}) has no output layer of its {option} named {', '.join(endings)}; its"
        f" linear layers are: {inside}. Name one with `{option}: [...]`, or use lora"
    )
