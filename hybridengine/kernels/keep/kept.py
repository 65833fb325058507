"""What brings kept bits back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = ["Kept", "mark_changed"]


class Kept:
    """The old bits of tensors. As a context it restores them at its end, whatever happens inside."""

    def __init__(self, restore: Callable[[], object]) -> None:
        self._restore: Callable[[], object] | None = restore

    def restore(self) -> None:
        """Write the old bits back and free the copy; nothing more the second time."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def mark_changed(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that memory was written past torch: a backward that needs the old values must fail, not mislead."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])
