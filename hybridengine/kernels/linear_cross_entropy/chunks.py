"""How many rows exist at a time.

More rows make each product of matrices run nearer to the machine's peak and read (and, for the gradient, add to) the
whole head less often; fewer rows need less memory. Per chunk of B rows the three products are 6 B H V operations, while
the head's gradient is read and written once: 8 H V bytes in float32. Computing outweighs that traffic twenty times at

    B = 20 * 8 * rate / (6 * bandwidth)

operations and bytes per second: about 500 rows on two CPU cores (300 GFLOPS, 15 GB/s).

The tiles of a CPU and the tensor cores of a GPU round a single product by themselves, so where all rows fit into one
chunk, no wide sum of the head's gradient is needed, whose V x H float32 numbers take the memory of the logits of H rows
(of their half-precision gradients on a GPU: 2 H). A single chunk may be as large as that sum and a chunk together.

The tiles pack the head for each chunk, which 256 rows pay for. On a GPU with tensor cores a chunk is kept as the
gradient of its logits in half precision; the wide logits exist for some rows of it only. On an H100 (H 4096, V 128256,
8192 rows) adding to the sum in 2, 4 and 8 chunks costs 13, 21 and 75 % of the product.
"""

from __future__ import annotations

import torch

from hybridengine.kernels.linear_cross_entropy.rows import Head, Split

__all__ = ["rows_of_logits", "rows_per_chunk", "rows_without_sum"]

_MOST_ROWS = 512
_FEWEST_ROWS = 128
_FEWEST_ROWS_IN_TILES = 256
_MOST_BYTES = 512 << 20
# Of all rows; so that the logits of a chunk, unless it has the fewest rows, stay below a fifth of what plain torch
# keeps, which is twice the whole, and half as much in bfloat16.
_LARGEST_PART = 4
_LARGEST_PART_IN_TILES = 6

_GPU_CHUNK_BYTES = 512 << 20
_GPU_LOGITS_BYTES = 512 << 20
_GPU_STEP = 256  # rows of a tile of a matrix product


def rows_per_chunk(head: Head, dtype: torch.dtype) -> int:
    """Return the number of rows in a chunk, where the gradient of the head is wanted.

    Args:
        head: the tensors.
        dtype: of the products.
    """
    rows, (classes, hidden) = len(head.x), head.weight.shape
    if head.x.device.type == "cpu":
        chunk = _rows_on_cpu(head, dtype)
        without_sum = chunk + hidden if dtype.itemsize == 2 and head.weight.dtype == dtype else chunk
        return max(rows, 1) if rows <= without_sum else chunk
    classes = max(classes, 1)
    if dtype.itemsize > 2:
        return rows_of_logits(classes)
    wide_sum = 4 * hidden * classes
    chunk = max(_GPU_CHUNK_BYTES, wide_sum)
    return max(rows, 1) if 2 * rows * classes <= chunk + wide_sum else _in_steps(chunk // (2 * classes))


def rows_without_sum(head: Head, split: Split) -> int:
    """Return the number of rows in a chunk where the gradient of the head is not summed, and no sum is to be spared."""
    if head.x.device.type == "cpu":
        return min(split.chunk_rows, _rows_on_cpu(head, split.dtype))
    return min(split.chunk_rows, rows_of_logits(len(head.weight)))


def _rows_on_cpu(head: Head, dtype: torch.dtype) -> int:
    rows, classes = len(head.x), max(len(head.weight), 1)
    if dtype.itemsize == 2:
        most, fewest, part = _MOST_ROWS, _FEWEST_ROWS_IN_TILES, _LARGEST_PART_IN_TILES
    else:
        widened = head.weight.dtype.itemsize < dtype.itemsize  # block by block, beside the logits
        most, fewest, part = _MOST_ROWS // 2 if widened else _MOST_ROWS, _FEWEST_ROWS, _LARGEST_PART
    return max(min(most, _MOST_BYTES // (4 * classes), max(-(-rows // part), fewest)), 1)


def rows_of_logits(classes: int) -> int:
    """Return how many rows of float32 logits exist at a time on a GPU."""
    return _in_steps(_GPU_LOGITS_BYTES // (4 * max(classes, 1)))


def _in_steps(rows: int) -> int:
    return max(rows // _GPU_STEP, 1) * _GPU_STEP
