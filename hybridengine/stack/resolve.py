"""From names to methods: find, validate, construct; every problem at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard

from hybridengine.config import Config, Source, split_entry
from hybridengine.errors import ConfigError
from hybridengine.plugin.calling import Hooks
from hybridengine.plugin.catalogue import Catalogue
from hybridengine.plugin.parameters import create
from hybridengine.plugin.stacking import Method

__all__ = ["DEFAULTS", "Resolved", "as_method", "plugin_problems", "resolve"]

DEFAULTS = {"build_optimizer": "adamw", "build_scheduler": "linear"}
"""Methods that join where no named method builds the optimizer or the schedule."""

_RESERVED = ("order", "check_effect")


@dataclass
class Resolved:
    """The members of a run: its task, its data plugin, and the stack."""

    task: Method
    data: Method
    methods: list[Method]
    problems: list[str] = field(default_factory=list)

    def hooks(self) -> Hooks:
        """A fresh plugin manager over all members."""
        return Hooks([self.task, self.data, *self.methods])


def resolve(config: Config, source: Source, catalogue: Catalogue, extra: Sequence[object] = ()) -> Resolved:
    """Find and construct every plugin that the config names.

    Args:
        extra: method objects given in Python, without packaging.

    Raises:
        ConfigError: with all problems, each naming file and line.
    """
    problems: list[str] = []
    name, options = config.task_entry
    task_at: tuple[str | int, ...] = ("task",) if isinstance(config.task, str) else ("task", name)
    task = _member(name, options, "task", task_at, source, catalogue, problems)
    data_options = dict(config.data.model_extra or {})
    data = _member(config.data.use, data_options, "data", ("data",), source, catalogue, problems)
    methods = [as_method(plugin) for plugin in extra]
    for index, method in enumerate(methods):
        if any(other.name == method.name for other in methods[:index]):
            problems.append(
                f"methods: two method objects are named {method.name!r}; give one another `name`, or drop it"
            )
    if lost := {name for entry in config.objects for name in entry} - {method.name for method in methods}:
        problems.append(
            f"{source.where(('objects',))}: this config was made with the method objects {sorted(lost)} of Python; pass"
            " them again: Engine(config, methods=[...]) or hybridengine.load(folder, methods=[...])"
        )
    methods += _named(enumerate(config.methods), [method.name for method in methods], source, catalogue, problems)
    if not problems:
        methods += _defaults(methods, source, catalogue, problems)
    if problems or task is None or data is None:
        raise ConfigError(problems)
    return Resolved(task, data, methods)


def plugin_problems(source: Source) -> list[str]:
    """What is wrong with the plugins of a config that is refused anyway: its entries that are well formed."""
    problems: list[str] = []
    catalogue = Catalogue()
    task = source.values.get("task")
    if _is_entry(task):
        name, options = split_entry(task)
        _member(
            name, options, "task", ("task",) if isinstance(task, str) else ("task", name), source, catalogue, problems
        )
    methods = source.values.get("methods")
    if isinstance(methods, list):
        entries = [(index, entry) for index, entry in enumerate(methods) if _is_entry(entry)]
        _named(entries, [], source, catalogue, problems)
    return problems


def _is_entry(entry: Any) -> TypeGuard[str | dict[str, dict[str, Any] | None]]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        return isinstance(entry, str)
    name, options = next(iter(entry.items()))
    return isinstance(name, str) and (options is None or isinstance(options, Mapping))


def _named(
    entries: Iterable[tuple[int, Any]],
    taken: Sequence[str],
    source: Source,
    catalogue: Catalogue,
    problems: list[str],
) -> list[Method]:
    """The methods that the config names; what is wrong with them is added to `problems`."""
    methods: list[Method] = []
    names = list(taken)
    for index, entry in entries:
        name, options = split_entry(entry)
        location: tuple[str | int, ...] = ("methods", index) if isinstance(entry, str) else ("methods", index, name)
        if name in names:
            problems.append(f"{source.where(location)}: method {name!r} is named twice; keep one entry")
            continue
        names.append(name)
        method = _member(name, options, "method", location, source, catalogue, problems)
        if method is not None:
            methods.append(method)
    return methods


def as_method(plugin: object) -> Method:
    """A method object given in Python as a member of the stack, named by its `name` or its class.

    Raises:
        ConfigError: not an instance of a dataclass, or a parameter out of its range.
    """
    if isinstance(plugin, str):
        raise ConfigError(f"methods: {plugin!r} is a name; names go into the config: methods: [{plugin}]")
    if isinstance(plugin, type):
        raise ConfigError(f"methods: pass an instance, not the class {plugin.__name__}; write {plugin.__name__}()")
    kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(plugin).__name__).lower()
    name = str(getattr(plugin, "name", kebab))
    if not is_dataclass(plugin):
        raise ConfigError(f"methods: {name!r} is not a dataclass; decorate its class with @dataclass(eq=False)")
    values = {f.name: getattr(plugin, f.name) for f in fields(plugin) if f.init}
    _, problems = create(name, type(plugin), values, Source({name: values}, "methods"), (name,))
    if problems:
        raise ConfigError(problems)
    return Method(name, plugin, type(plugin).__module__, "", values)


def _member(
    name: str,
    options: Mapping[str, Any],
    kind: str,
    location: tuple[str | int, ...],
    source: Source,
    catalogue: Catalogue,
    problems: list[str],
) -> Method | None:
    try:
        listing = catalogue.find(name, source.where(location), kind)
    except ConfigError as error:
        problems.extend(error.problems)
        return None
    cls = listing.load()
    own = {key: value for key, value in options.items() if key not in _RESERVED or kind != "method"}
    plugin, found = create(name, cls, own, source, location)
    problems.extend(found)
    if plugin is None:
        return None
    method = Method(name, plugin, listing.distribution, listing.version)
    if method.traits.kind != kind:
        place = {"method": "methods", "task": "task", "data": "data.use"}[method.traits.kind]
        problems.append(f"{source.where(location)}: {name!r} is a {method.traits.kind} plugin; name it under `{place}`")
        return None
    method.parameters = {f.name: getattr(plugin, f.name) for f in fields(cls) if f.init}
    if kind == "method":
        method.order_override, method.check_effect = _reserved(name, options, source, location, problems)
    return method


def _reserved(
    name: str, options: Mapping[str, Any], source: Source, location: tuple[str | int, ...], problems: list[str]
) -> tuple[int | None, bool]:
    order, check = options.get("order"), options.get("check_effect", True)
    if order is not None and (isinstance(order, bool) or not isinstance(order, int)):
        problems.append(f"{source.where((*location, 'order'))}: {name}.order must be a whole number, got {order!r}")
        order = None
    if not isinstance(check, bool):
        problems.append(f"{source.where((*location, 'check_effect'))}: {name}.check_effect must be true or false")
        check = True
    return order, check


def _defaults(methods: Sequence[Method], source: Source, catalogue: Catalogue, problems: list[str]) -> list[Method]:
    added = []
    known = set(catalogue.names())
    for hook_name, name in DEFAULTS.items():
        if name in known and not any(hasattr(m.plugin, hook_name) for m in methods):
            method = _member(name, {}, "method", (), source, catalogue, problems)
            if method is not None:
                added.append(method)
    return added
