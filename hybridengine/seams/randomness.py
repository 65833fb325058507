"""Keyed randomness: every draw is a function of what it is for, never of how many draws came before."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["KeyedRows", "dropout_key", "generator_of", "mix", "permutation", "seeded"]


def mix(*parts: object) -> int:
    """A 56-bit key from any values with a stable `repr` (torch generators take 64 signed bits)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


class KeyedRows:
    """Random numbers per row, each a function of (key, row id) alone.

    A row's numbers do not depend on the other rows of the batch, nor on padding: a longer draw starts with the
    numbers of the shorter one. Hence uniforms only: torch's `normal_` has no such prefix property.
    """

    def __init__(self, key: Sequence[object], rows: Sequence[int]) -> None:
        self._key = tuple(key)
        self._rows = tuple(rows)
        self._generator = torch.Generator()

    def uniform(self, *shape: int) -> Tensor:
        """fp32 numbers in [0, 1), shape `[B, *shape]`, on the CPU."""
        out = torch.empty((len(self._rows), *shape), dtype=torch.float32)
        for index, row in enumerate(self._rows):
            out[index].uniform_(generator=self._generator.manual_seed(mix(*self._key, row)))
        return out

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers `[B, *shape]` by Box-Muller, prefix-stable like the uniforms."""
        pairs = self.uniform(*shape, 2)
        radius = (-2 * torch.log1p(-pairs[..., 0])).sqrt()
        return radius * torch.cos(2 * math.pi * pairs[..., 1])

    def beta(self, alpha: float) -> Tensor:
        """One fp64 number of Beta(alpha, alpha) for each row, `[B]`."""
        draws = (random.Random(mix(*self._key, row)).betavariate(alpha, alpha) for row in self._rows)
        return torch.tensor(list(draws), dtype=torch.float64)


def permutation(size: int, *key: object) -> list[int]:
    """A shuffled `range(size)` that depends on the key alone."""
    generator = torch.Generator().manual_seed(mix(*key))
    return torch.randperm(size, generator=generator).tolist()


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that dropout on `device` draws from."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def dropout_key(device: torch.device, key: int | None) -> contextlib.AbstractContextManager[None]:
    """Dropout inside draws the masks of `key`; the global streams are as before afterwards.

    Models also draw on the host whatever their device: layer drop is a `torch.rand([])`.
    """
    if key is None:
        return contextlib.nullcontext()
    if device.type == "cpu":
        return seeded(torch.default_generator, key)
    return _host_and_device(key, generator_of(device))


@contextlib.contextmanager
def _host_and_device(key: int, device: torch.Generator) -> Iterator[None]:
    with seeded(torch.default_generator, key), seeded(device, key):
        yield


class seeded:  # a class without loops, not a generator function: every pass enters it
    """Draws of the generator inside start from `seed`; its state is as before afterwards.

    It costs microseconds and touches nothing else; `torch.manual_seed` reseeds every GPU, `fork_rng` or not.
    """

    __slots__ = ("_before", "_generator", "_seed")

    def __init__(self, generator: torch.Generator, seed: int) -> None:
        self._generator, self._seed = generator, seed

    def __enter__(self) -> None:
        self._before = self._generator.get_state()
        self._generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        self._generator.set_state(self._before)
