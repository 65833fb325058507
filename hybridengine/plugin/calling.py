"""How hooks are called: registration checks, conventions by prefix, and blame for what a plugin does wrong."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pluggy

from hybridengine.errors import HybridEngineError, PluginError, did_you_mean
from hybridengine.plugin.hookspecs import PROJECT, HookSpecs
from hybridengine.plugin.stacking import Method
from hybridengine.plugin.traits import Traits

__all__ = ["Hooks", "blame"]

_PREFIXES = ("build_", "transform_", "wrap_", "on_", "check_")
_MARK = f"{PROJECT}_impl"
_RESULTS: dict[str, type] = {
    "build_data": Mapping,
    "build_features": Sequence,
    "build_sampler": Callable,  # type: ignore[dict-item]
    "build_tokenizer": Callable,  # type: ignore[dict-item]
}
SPEC_NAMES = tuple(name for name in vars(HookSpecs) if name.startswith(_PREFIXES))


class Hooks:
    """The hooks of one run. One fresh plugin manager each; nothing global.

    Attributes:
        methods: in order of their bands.
        slots: what they take.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(HookSpecs)
        self.methods = sorted(methods, key=lambda m: m.order)
        self.slots = frozenset(slot for method in methods for slot in method.traits.slots)
        for method in self.methods:
            _check(method)
            try:
                self._manager.register(method.plugin, name=method.name)
            except pluggy.PluginValidationError as error:
                raise PluginError(f"plugin {method.label}: {error}") from error
            except ValueError:
                raise PluginError(
                    f"plugin {method.label}: another member of the run has this name; rename it"
                ) from None

    def implementations(self, hook_name: str) -> list[tuple[Method, Callable[..., Any]]]:
        """Members that implement a hook, innermost first."""
        registered = {id(impl.plugin) for impl in getattr(self._manager.hook, hook_name).get_hookimpls()}
        return [(m, getattr(m.plugin, hook_name)) for m in self.methods if id(m.plugin) in registered]

    def build(
        self, hook_name: str, *args: Any, only: str | None = None, expect: type | tuple[type, ...] | None = None
    ) -> Any | None:
        """First non-None result of a `build_*` hook; `only` asks one named plugin."""
        for method, function in self.implementations(hook_name):
            if only is None or method.name == only:
                result = _call(method, hook_name, function, *args)
                if result is not None:
                    return _expect(method, hook_name, result, expect or _RESULTS.get(hook_name, object))
        return None

    def transform(self, hook_name: str, *args: Any, expect: type | tuple[type, ...] = object) -> Any:
        """Thread the last argument through a `transform_*` hook."""
        folded = self.chain(hook_name, expect)
        return args[-1] if folded is None else folded(*args)

    def chain(self, hook_name: str, expect: type | tuple[type, ...] = object) -> Callable[..., Any] | None:
        """A `transform_*` hook folded once into one function, for the hot path; None where nobody implements it."""
        found = self.implementations(hook_name)
        if not found:
            return None

        def run(*args: Any) -> Any:
            *fixed, value = args
            for method, function in found:
                changed = _call(method, hook_name, function, *fixed, value)
                if changed is not None:
                    value = _expect(method, hook_name, changed, expect)
            return value

        return run

    def notify(self, hook_name: str, *args: Any) -> None:
        """Call every `on_*` observer."""
        for method, function in self.implementations(hook_name):
            if _call(method, hook_name, function, *args) is not None:
                raise PluginError(f"plugin {method.label}: {hook_name} only observes and must return None")

    def collect(self, hook_name: str, *args: Any) -> list[Any]:
        """All results of a `check_*` hook, flattened."""
        found: list[Any] = []
        for method, function in self.implementations(hook_name):
            found.extend(_expect(method, hook_name, _call(method, hook_name, function, *args) or [], (list, tuple)))
        return found

    def layers(self, hook_name: str, expect: type | tuple[type, ...]) -> list[tuple[Method, Callable[..., Any]]]:
        """The layers of a `wrap_*` seam, innermost first, each guarded: blame on errors, checked result."""
        found = self.implementations(hook_name)
        return [(method, _layer(method, hook_name, function, expect)) for method, function in found]


def _layer(method: Method, hook_name: str, function: Callable[..., Any], expect: Any) -> Callable[..., Any]:
    scheduled = hasattr(method.plugin, "active")

    def layer(inner: Callable[..., Any], ctx: Any, *args: Any) -> Any:
        if scheduled and not method.active(ctx.run.step):
            return inner(ctx, *args)
        try:
            result = function(inner, ctx, *args)
        except Exception as error:
            blame(error, method, hook_name)
            raise
        return result if isinstance(result, expect) else _expect(method, hook_name, result, expect)

    return layer


def _call(method: Method, hook_name: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        blame(error, method, hook_name)
        raise


def _expect(method: Method, hook_name: str, result: Any, expect: type | tuple[type, ...]) -> Any:
    if isinstance(result, expect):
        return result
    wanted = expect.__name__ if isinstance(expect, type) else " or ".join(t.__name__ for t in expect)
    raise PluginError(f"plugin {method.label}: {hook_name} must return {wanted}, got {type(result).__name__}")


def blame(error: BaseException, method: Method | None, hook_name: str) -> None:
    """Note once, on the innermost layer that an exception leaves, which plugin and hook raised it.

    `method` None marks the engine's own code, so that no outer layer is blamed for it. The type is kept.
    """
    if getattr(error, "_hybridengine_blamed", False):
        return
    try:
        error._hybridengine_blamed = True  # type: ignore[attr-defined]
    except AttributeError:  # exceptions with __slots__
        return
    if method is not None and not isinstance(error, HybridEngineError):
        error.add_note(f"raised by plugin {method.label} in hook {hook_name}")


def _check(method: Method) -> None:
    """Refuse misspelt and undecorated hooks, and signatures that do not match the contract."""
    plugin = method.plugin
    if not isinstance(getattr(type(plugin), "traits", Traits()), Traits):
        raise PluginError(f"plugin {method.label}: traits must be Traits(...), got {type(plugin).traits!r}")
    decide = getattr(type(plugin), "active", None)
    if callable(decide) and len(inspect.signature(decide).parameters) != 2:
        raise PluginError(f"plugin {method.label}: active takes (self, step) and returns whether it acts at this step")
    for name in dir(type(plugin)):
        if name.startswith("__"):
            continue
        function = inspect.getattr_static(type(plugin), name)
        if not callable(function):
            continue
        marked = hasattr(function, _MARK)
        if name in SPEC_NAMES:
            if not marked:
                raise PluginError(f"plugin {method.label}: {name} is a hook but lacks its decorator; add @hook")
            wanted = list(inspect.signature(vars(HookSpecs)[name]).parameters)[1:]
            got = list(inspect.signature(function).parameters)[1:]
            if wanted != got:
                raise PluginError(
                    f"plugin {method.label}: {name} takes ({', '.join(got)}), expected ({', '.join(wanted)})"
                )
        elif marked:
            raise PluginError(
                f"plugin {method.label}: {name!r} is decorated with @hook but no such hook exists."
                + did_you_mean(name, SPEC_NAMES)
            )
        elif name.startswith(_PREFIXES) and difflib.get_close_matches(name, SPEC_NAMES, n=1, cutoff=0.85):
            raise PluginError(
                f"plugin {method.label}: function {name!r} looks like a misspelt hook." + did_you_mean(name, SPEC_NAMES)
            )
