"""`hybridengine schema`: the JSON Schema of a config, for editors and checks."""

from __future__ import annotations

from hybridengine.cli import console

__all__ = ["run"]


def run() -> None:
    """Print the JSON Schema of the config.

    With the parameters of every installed task, data plugin and method, which are imported for it.
    """
    from hybridengine.cli.config_schema import config_schema
    from hybridengine.errors import PluginError
    from hybridengine.plugin import Catalogue
    from hybridengine.plugin.parameters import json_schema

    plugins = []
    for listing in Catalogue().all():
        try:
            cls = listing.load()
            kind = getattr(getattr(cls, "traits", None), "kind", "method")
            plugins.append((listing.name, kind, json_schema(listing.name, cls)))
        except PluginError as error:
            console.note(f"warning: left out: {error}")
    console.print_json(config_schema(plugins))
