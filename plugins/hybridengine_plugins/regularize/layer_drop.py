"""LayerDrop: whole layers are left out of training passes at random, or for good."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError
from hybridengine.model import layer_stacks
from hybridengine.plugin import Band, Run, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, Work, override_forward, wide

__all__ = ["LayerDrop"]

_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
_COUNTS += ("encoder_layers", "decoder_layers")


@dataclass(eq=False)
class LayerDrop:
    """Leaves each layer out of a training pass with probability p: the others must do without it.

    Maths: with b ~ Bernoulli(1 − p) for each layer and pass, h ← layer(h) where b = 1, else h. The draws follow the
    dropout key: passes that share their masks (an attack's steps, both passes of SAM) leave out the same layers, and
    R-Drop's two passes run apart, each with its own draws. Evaluation uses every layer. `keep: n` cuts the model at the
    start to every n-th layer, the first included (the paper's "every other" for n = 2), and saves a smaller model; fit
    it to a model that was trained with LayerDrop before, or distil into it.

    Paper: Fan, Grave, Joulin 2020, "Reducing Transformer Depth on Demand with Structured Dropout".
    Hooks: `check_stack`, `transform_model`, `wrap_loss`, `wrap_step`. Cost: 1 − p of a plain step; T5, whose layers
    hand on a position bias, computes a dropped layer but not its gradient. Combines with everything; it is dropout
    enough for `rdrop`.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.LEAF + 5,  # around the leaf loss, whichever it is, and inside everything else
        stackable=False,
        effect="at_stake",
        cost="1 - p of a plain step",
        paper="Fan, Grave, Joulin 2020, arXiv:1909.11556",
        combines="everything; `keep` not with adapters",
    )

    p: float = parameter(0.2, "share of the layers that a training pass leaves out", ge=0, lt=1)
    keep: int = parameter(1, "keep every n-th layer at the start; 1 keeps all", ge=1)
    _draws: int = field(default=0, init=False, repr=False)
    _dropped: int = field(default=0, init=False, repr=False)
    _cut: int = field(default=0, init=False, repr=False)

    def also_provides(self) -> tuple[str, ...]:
        """What needs two different passes gets them."""
        return ("dropout",) if self.p > 0 else ()

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """What cannot work with layers that come and go."""
        problems = []
        if self.p > 0 and stack.facts["config"].train.compile:
            problems.append("layer-drop: a compiled model always runs every layer; set `train.compile: false`")
        adapters = [m.name for m in stack.methods if "backbone" in m.traits.slots and m.name not in ("full", "bitfit")]
        if self.keep > 1 and adapters:
            problems.append(
                f"layer-drop: with keep {self.keep}, the folder that {adapters[0]} saves would name a base model of"
                f" another depth; cut the model in a first stage of `stages`, or remove {adapters[0]}"
            )
        return problems

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Cut the model where asked to, and let every layer draw.

        Raises:
            ModelError: there are no layers, or the model cannot be cut.
        """
        stacks = layer_stacks(model)
        if not stacks:
            raise ModelError("layer-drop: this model has no stack of layers (an nn.ModuleList); remove layer-drop")
        if self.keep > 1:
            before = sum(map(len, stacks.values()))
            stacks = _cut(model, stacks, self.keep)
            self._cut = before - sum(map(len, stacks.values()))
            run.say(f"layer-drop: {before - self._cut} of {before} layers are kept")
        for layers in stacks.values() if self.p > 0 else ():
            for layer in layers:
                override_forward(layer, self._dropping)
        return model

    def _dropping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's forward, or nothing."""
        more = True  # whether it returns more than states, unknown until it was seen once

        def maybe(layer: nn.Module, *args: Any, **options: Any) -> Any:
            nonlocal more
            dropped = layer.training and self._draw()
            if dropped and not more:
                return args[0] if args else options["hidden_states"]
            output = forward(layer, *args, **options)
            more = not isinstance(output, Tensor)
            if not dropped:
                return output
            states = args[0] if args else options["hidden_states"]
            return (states, *output[1:]) if more else states

        return maybe

    def _draw(self) -> bool:
        dropped = float(torch.rand(())) < self.p  # on the host, whose stream the dropout key pins as well
        self._draws += 1
        self._dropped += dropped
        return dropped

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """Where all that trains stands in layers that were left out, the gradient is zero and not missing."""
        out = inner(ctx, batch, view)
        if not torch.is_grad_enabled() or any(value.requires_grad for value, _ in out.terms.values()):
            return out
        leaves = ctx.run.optimised().values() if view.params is None else view.params.values()
        zero = torch.stack([0.0 * wide(leaf.flatten()[0]) for leaf in leaves]).sum()
        return replace(out, terms={name: (value + zero, unit) for name, (value, unit) in out.terms.items()})

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Tell how many layers were drawn for (and cut before), and how many of the drawn were dropped."""
        self._draws = self._dropped = 0
        terms = inner(ctx, works)
        ctx.report(self, at_stake=float(self._draws + self._cut), dropped=float(self._dropped))
        return terms


def _cut(model: nn.Module, stacks: Mapping[str, nn.ModuleList], keep: int) -> dict[str, nn.ModuleList]:
    """Keep layers 0, keep, 2·keep, ... of every stack, numbered anew, and let the configurations say so."""
    if all(len(layers) == 1 for layers in stacks.values()):
        raise ModelError("layer-drop: every stack of this model is one layer, so there is none to cut; set keep to 1")
    kept = {name: nn.ModuleList(layers[::keep]) for name, layers in stacks.items()}
    for name, layers in kept.items():
        model.set_submodule(name, layers)
        for number, layer in enumerate(layers):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):  # its place in a cache
                    module.layer_idx = number
    for config in _configs(model):
        for key, value in config.to_dict().items():
            if key in _COUNTS and isinstance(value, int):
                setattr(config, key, -(-value // keep))
            elif key == "layer_types" and value:
                config.layer_types = value[::keep]
    _check_rebuilt(model)
    return kept


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration object inside the model, each once."""
    found = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return iter(found.values())


def _check_rebuilt(model: Any) -> None:
    """Transformers must build the same model from its configuration, or `best/` could not be loaded."""
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"layer-drop: this model cannot be built with fewer layers ({error}); set keep to 1"
        ) from error
    if twin.state_dict().keys() != model.state_dict().keys():
        raise ModelError("layer-drop: this model's configuration does not tell its number of layers; set keep to 1")
