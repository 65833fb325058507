"""What the kernel tests share: the instruction sets of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hybridengine import kernels
from hybridengine.kernels import native

needs_native = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

ISAS = [] if native.why_missing() else native.module().supported_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each instruction set that this CPU has."""
    before = kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
