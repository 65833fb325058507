"""A method as the stack sees it: the plugin object with its identity, parameters and traits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridengine.plugin.traits import Traits

__all__ = ["Method", "StackView"]


@dataclass(eq=False)
class Method:
    """One member of a stack.

    Attributes:
        name: config name.
        plugin: the dataclass instance whose decorated functions are its behaviour.
        distribution: name and version of the distribution it came from.
        parameters: resolved hyper-parameters.
        order_override: the user's `order:`, in place of the declared band.
        check_effect: False when the user wrote `check_effect: false`.
    """

    name: str
    plugin: Any
    distribution: str = "local"
    version: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    order_override: int | None = None
    check_effect: bool = True

    @property
    def traits(self) -> Traits:
        """The declarative half; a plugin without traits gets the defaults."""
        traits = getattr(type(self.plugin), "traits", None)
        return traits if isinstance(traits, Traits) else Traits()

    @property
    def described(self) -> dict[str, Any]:
        """Hyper-parameters as JSON can hold them."""
        plain = (int, float, str, bool, list, dict, type(None))
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in self.parameters.items()}
        return {k: v if isinstance(v, plain) else repr(v) for k, v in listed.items()}

    @property
    def order(self) -> int:
        """Position inside its seams."""
        return self.traits.order if self.order_override is None else self.order_override

    @property
    def label(self) -> str:
        """`name (distribution version)` for error messages."""
        return f"{self.name!r} ({self.distribution} {self.version})".replace(" )", ")")

    @property
    def provides(self) -> tuple[str, ...]:
        """Capabilities it adds: those of its traits, and what `also_provides()` derives from its parameters."""
        more = getattr(self.plugin, "also_provides", None)
        return self.traits.provides + (tuple(more()) if more is not None else ())

    def active(self, step: int) -> bool:
        """Whether the method acts at this step."""
        decide = getattr(self.plugin, "active", None)
        try:
            return True if decide is None else bool(decide(step))
        except Exception as error:
            error.add_note(f"raised by plugin {self.label} in active")
            raise


@dataclass(frozen=True)
class StackView:
    """What `check_stack` may look at: the members, and the facts of configuration, task and model."""

    methods: Sequence[Method]
    facts: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Config names, in order."""
        return [method.name for method in self.methods]

    def parameters(self, name: str) -> Mapping[str, Any]:
        """Hyper-parameters of a named member."""
        return next(m.parameters for m in self.methods if m.name == name)
