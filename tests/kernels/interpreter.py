"""Triton's interpreter, made to work with the numpy that is installed."""

from __future__ import annotations

from typing import Any

__all__ = ["repair_loop_bounds"]


def repair_loop_bounds() -> None:
    """Let a kernel loop over `range(0, n)` for an argument n.

    The interpreter holds scalars as arrays of one element and calls `int` on them, which numpy 2.4 refuses.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
