"""`mode="low_memory"` on a GPU: tensor cores around the kernels of `triton_blocks`. The passes are those of `blocked`.

What a row is multiplied by follows from its sums as in `csrc/cross_entropy/cuda.cuh`. Of the gradient only one block
exists, in half precision and without the factor of a mean, which multiplies the products (see `products.Narrow`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridengine.kernels import operators
from hybridengine.kernels.cross_entropy.options import Options, is_soft
from hybridengine.kernels.linear_cross_entropy.memory import matrix
from hybridengine.kernels.linear_cross_entropy.products import Products, write_of_weight
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Wanted

__all__ = ["Blocks"]

_sum_block = operators.later("hybridengine.kernels.linear_cross_entropy.triton_blocks", "sum_block")
_write_block = operators.later("hybridengine.kernels.linear_cross_entropy.triton_blocks", "write_block")


class Blocks:
    """The two passes over the head, as `blocked.run` calls them."""

    def __init__(self, products: Products) -> None:
        """`products`: with the head; the factors of the rows are divided by theirs."""
        self.products = products

    def __call__(
        self,
        head: Head,
        options: Options,
        block: int,
        wanted: Wanted,
        factors: tuple[Tensor, Tensor],
        by_loss: Tensor | None,
        by_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Return row losses [N], log-sum-exps [N] and gradients."""
        x_dtype = head.x.dtype
        head = head._replace(
            x=self.products.rows(head.x),
            target=head.target.float().contiguous() if head.target.dtype == torch.float64 else head.target.contiguous(),
            class_weight=None if head.class_weight is None else head.class_weight.float().contiguous(),
        )
        rows, classes = len(head.x), len(head.weight)
        device = head.x.device
        logits = matrix(rows, block, torch.float32, device)
        sums = torch.zeros(4, rows, device=device)
        sums[0] = -torch.inf
        label_y = torch.zeros(rows, device=device)
        problem = head.target, head.class_weight
        for at, part in self._logits(head, logits, block):
            _sum_block(part, *problem, at.start, classes, options, sums, label_y)
        maximum, total, gap, mass = sums
        hard = _hard(head, options)
        log_total = torch.where(total > 0, total.log(), torch.nan)
        lse = maximum + log_total
        loss = gap + mass * log_total
        if not is_soft(head.target):
            loss += torch.where(hard == 0, 0, hard * (maximum - label_y)) + hard * log_total
        s, z = factors[0], factors[1] * options.z_loss
        loss = s * loss + z * lse.square() if options.z_loss else s * loss
        if not any(wanted):
            return loss, lse, Gradients(None, None, None)
        coming = logits.new_ones(()) if by_loss is None else by_loss.float()
        by_probability = coming * (s * (hard + mass) + (2 * z * lse if options.z_loss else 0.0)) / self.products.factor
        if by_lse is not None:
            by_probability = by_probability + by_lse.float() / self.products.factor
        by_exponential = by_probability / total
        shift = torch.where(maximum == -torch.inf, 0, maximum)
        by_share = (coming * s / self.products.factor).expand(rows).contiguous()
        by = (hard, shift, by_exponential, by_share)
        gradients = self._gradients(head, logits, block, wanted, options, by)
        return loss, lse, gradients._replace(x=None if gradients.x is None else gradients.x.to(x_dtype))

    def _logits(self, head: Head, buffer: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(head.weight), block):
            at = slice(start, min(start + block, len(head.weight)))
            part = buffer[:, : at.stop - at.start]
            bias = None if head.bias is None else head.bias[at]
            self.products.of_classes(at).logits(head.x, bias, part)
            yield at, part

    def _gradients(
        self, head: Head, logits: Tensor, block: int, wanted: Wanted, options: Options, by: tuple[Tensor, ...]
    ) -> Gradients:
        gradient = matrix(len(head.x), block, self.products.gradient_dtype or torch.float32, head.x.device)
        by_x = torch.empty(head.x.shape, device=head.x.device) if wanted.x else None
        by_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if wanted.weight else None
        by_bias = torch.empty_like(head.bias) if wanted.bias and head.bias is not None else None
        for at, part in self._logits(head, logits, block):
            g = gradient[:, : at.stop - at.start]
            _write_block(part, head.target, head.class_weight, at.start, len(head.weight), options, g, *by)
            products = self.products.of_classes(at)
            if by_x is not None:
                products.add_of_x(by_x, g, first=at.start == 0)
            if by_weight is not None:
                write_of_weight(products, by_weight[at], g, head.x)
            if by_bias is not None:
                by_bias[at] = products.of_bias(g).to(by_bias.dtype)
        return Gradients(by_x, by_weight, by_bias)


def _hard(head: Head, options: Options) -> Tensor:
    """Return what each row's label has beyond its dense share, (1 - e) w_t; 0 for soft targets."""
    if is_soft(head.target):
        return torch.zeros(len(head.x), device=head.x.device)
    hard = torch.full((len(head.x),), 1.0 - options.label_smoothing, device=head.x.device)
    return hard if head.class_weight is None else hard * head.class_weight[head.target]
