"""Which plugins exist. Metadata is read without importing; only what a config names is imported."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from hybridengine.errors import ConfigError, PluginError, did_you_mean

__all__ = ["GROUP", "Catalogue", "Listing"]

GROUP = "hybridengine.plugins"


@dataclass(frozen=True)
class Listing:
    """One installed plugin, known from metadata alone."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint

    def load(self) -> type:
        """Import the plugin's class.

        Raises:
            PluginError: naming plugin, distribution and version; the original exception is its cause.
        """
        where = f"plugin {self.name!r} of {self.distribution} {self.version} ({self.entry.value})"
        try:
            loaded = self.entry.load()
        except (Exception, SystemExit) as error:  # a module may do anything when it is imported
            raise PluginError(
                f"{where} cannot be imported: {type(error).__name__}: {error}. Reinstall or remove {self.distribution}."
            ) from error
        if not isinstance(loaded, type):
            raise PluginError(f"{where} must name a class, not {loaded!r}; point the entry point at the dataclass")
        return loaded


class Catalogue:
    """All installed plugins by name. Reading it imports none of them."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[Listing]] = defaultdict(list)
        for entry in entry_points(group=GROUP):
            name = entry.dist.name if entry.dist else "unknown"
            version = entry.dist.version if entry.dist else ""
            listing = Listing(entry.name, name, version, entry)
            known = self._by_name[entry.name]
            # The same distribution can stand twice on sys.path (an editable install beside its source).
            if all((other.distribution, other.entry.value) != (name, entry.value) for other in known):
                known.append(listing)

    def names(self) -> list[str]:
        """Every plugin name."""
        return sorted(self._by_name)

    def all(self) -> list[Listing]:
        """Every installed plugin, clashes included."""
        return [listing for name in self.names() for listing in self._by_name[name]]

    def find(self, name: str, where: str = "", kind: str = "method") -> Listing:
        """The plugin of this name, or of `distribution:name`.

        Raises:
            ConfigError: unknown name (with the nearest), or several distributions claiming it.
        """
        distribution, colon, short = name.rpartition(":")
        prefix = f"{where}: " if where else ""
        found = self._by_name.get(short, [])
        if colon:
            found = [listing for listing in found if listing.distribution == distribution]
        if not found:
            raise ConfigError(f"{prefix}unknown {kind} {name!r}.{did_you_mean(short, self.names())}")
        if len(found) > 1:
            claims = " and ".join(f"{x.distribution} {x.version}" for x in found)
            raise ConfigError(
                f"{prefix}{kind} {name!r} is claimed by {claims}; write '{found[0].distribution}:{short}' to choose"
            )
        return found[0]
