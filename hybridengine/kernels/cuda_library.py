"""The optional CUDA library, or the reason why there is none.

It is plain C without torch or Python in it (`csrc/*/cuda.cu`, built where nvcc was found at install time), loaded when
first asked for. Every operation exports functions of one shape: `int f(const Problem*, size_t size, void* stream)`,
where `Problem` is a struct that the operation's module mirrors as a `ctypes.Structure`, `size` tells a mismatch of the
two, and the result is an error of the CUDA runtime.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from hybridengine.errors import KernelUnavailable

__all__ = ["ELEMENT_TYPES", "CudaLibrary", "library", "why_missing"]

# The numbers of `CudaElement` in csrc/common/cuda/element.cuh.
ELEMENT_TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}

LAUNCHERS = ("cross_entropy_forward", "cross_entropy_backward")

_FOLDER = Path(__file__).parent
_OLDEST_CAPABILITY = (8, 0)


class CudaLibrary:
    """A loaded library.

    Raises:
        OSError: if the file cannot be loaded.
        AttributeError: if it lacks one of the functions (it is of another version).
    """

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self._launchers = {name: getattr(loaded, f"hybridengine_{name}") for name in LAUNCHERS}
        for launcher in self._launchers.values():
            launcher.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
            launcher.restype = ctypes.c_int
        self._probe = loaded.hybridengine_cuda_probe
        self._probe.argtypes, self._probe.restype = [], ctypes.c_int
        self._error_text = loaded.hybridengine_cuda_error_text
        self._error_text.argtypes, self._error_text.restype = [ctypes.c_int], ctypes.c_char_p

    def probe(self) -> str | None:
        """Return CUDA's text on why the current device cannot run this library, or None if it can."""
        error = self._probe()
        return self._text(error) if error else None

    def launch(self, function: str, problem: ctypes.Structure, device: torch.device) -> None:
        """Queue `function` on the current stream of `device`.

        Raises:
            RuntimeError: if it cannot be launched; with CUDA's text. What happens later on the device shows at the next
                synchronisation, as with torch's own kernels.
        """
        with torch.cuda.device(device):
            self._call(function, problem, torch.cuda.current_stream(device).cuda_stream)

    def _call(self, function: str, problem: ctypes.Structure, stream: int) -> None:
        error = self._launchers[function](ctypes.byref(problem), ctypes.sizeof(problem), stream)
        if error:
            raise RuntimeError(f"{function} could not be launched: {self._text(error)}")

    def _text(self, error: int) -> str:
        text: bytes = self._error_text(error)
        return f"{text.decode()} (CUDA error {error})"


@cache
def _load() -> CudaLibrary | str:
    """Return the library, or why it cannot be had."""
    path = _FOLDER / "_cuda.so"
    if not path.exists():
        note = _FOLDER / "_cuda_missing.txt"
        reason = note.read_text(encoding="utf-8").strip() if note.exists() else "this installation was made without it"
        return f"the CUDA library is not built: {reason}"
    try:
        return CudaLibrary(path)
    except (OSError, AttributeError) as error:
        return f"the CUDA library cannot be loaded: {error}"


def why_missing() -> str | None:
    """Return why the CUDA kernels cannot run here, or None if they can."""
    return _why_missing()


# A traced caller is told the answer, not how it is found. `torch.compiler.assume_constant_result` sets the same, but
# imports torch._dynamo, which takes a second.
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_missing() -> str | None:
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        return "the GPU is older than compute capability {}.{}".format(*_OLDEST_CAPABILITY)
    return loaded.probe()


def library() -> CudaLibrary:
    """Return the library.

    Raises:
        KernelUnavailable: if it is missing; the message says why.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise KernelUnavailable(loaded)
    return loaded
