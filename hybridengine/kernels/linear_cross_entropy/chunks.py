"""How many rows of logits exist at a time.

More rows make each product of matrices run nearer to the machine's peak and read (and, for the gradient, add to) the
whole head less often; fewer rows need less memory. Per chunk of B rows the three products are 6 B H V operations, while
the head's gradient is read and written once: 8 H V bytes in float32. Computing outweighs that traffic twenty times at

    B = 20 * 8 * rate / (6 * bandwidth)

operations and bytes per second: about 500 rows on two CPU cores (300 GFLOPS, 15 GB/s), 2,000 to 4,000 on a GPU of the
H100 kind (700 TFLOPS, 3 TB/s, and half of that traffic is hidden there).
"""

from __future__ import annotations

import torch

__all__ = ["rows_per_chunk"]

_MOST_ROWS = {"cpu": 512, "cuda": 4096}
_FEWEST_ROWS = 64
_MOST_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
# Of all rows; so that a chunk's logits stay below a fifth of what plain torch keeps, which is twice the whole.
_LARGEST_PART = 4


def rows_per_chunk(rows: int, classes: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of rows in a chunk.

    Args:
        rows: that count.
        classes: of the head.
        device: of the tensors.
        dtype: of the head. On a CPU half precision is computed in float32, with blocks of the head beside the logits.
    """
    most = _MOST_ROWS.get(device.type, _MOST_ROWS["cuda"])
    if device.type == "cpu" and dtype.itemsize == 2:
        most //= 2
    fitting = _MOST_BYTES.get(device.type, _MOST_BYTES["cuda"]) // (4 * max(classes, 1))
    part = -(-rows // _LARGEST_PART)
    return max(min(most, fitting, max(part, _FEWEST_ROWS)), 1)
