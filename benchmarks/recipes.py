"""The recipes that circulate for adversarial, consistency and meta-learning, as their authors' code has them.

Each is a training step of a classifier in plain torch: same model, batch, precision, clipping and optimizer as the
engine's step beside it. Sources: the FGM and PGD classes of the Chinese NLP competitions (e.g. TorchBlocks),
davda54/sam, dropreg/R-Drop, and the double loop with `create_graph` of any MAML tutorial, written with
`torch.func.functional_call` and with fused attention wherever no second derivative passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridengine import kernels
from hybridengine.seams import Batch

__all__ = ["RECIPES", "Recipe"]

EPSILON, STEP_SIZE, STEPS, RHO, ALPHA, INNER_LR = 0.1, 0.05, 3, 0.05, 1.0, 0.1


class Recipe:
    """A model and its optimizer, to make steps by hand.

    Args:
        lend: run forward passes with the engine's own kernels for dropout, GELU and embeddings, so that what is left
            of the difference is the algorithm's.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, lend: bool = False) -> None:
        self.model, self.optimizer = model.train(), optimizer
        self.named = dict(model.named_parameters())
        self.embedding = model.get_input_embeddings()
        self._lent: Callable[[], Any] = kernels.fast_forward if lend else contextlib.nullcontext

    def logits(self, batch: Batch, params: dict[str, Tensor] | None = None) -> Tensor:
        with self._lent():
            if params is None:
                return self.model(**batch.inputs).logits
            return functional_call(self.model, params, (), dict(batch.inputs)).logits

    def loss(self, batch: Batch, params: dict[str, Tensor] | None = None) -> Tensor:
        return functional.cross_entropy(self.logits(batch, params), batch.targets)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(recipe: Recipe, batch: Batch) -> None:
    recipe.loss(batch).backward()
    recipe.update()


def _attack(weight: Tensor, step: float) -> None:
    norm = torch.norm(weight.grad)  # type: ignore[arg-type]
    if norm != 0 and not torch.isnan(norm):
        weight.data.add_(step * weight.grad / norm)


def fgm(recipe: Recipe, batch: Batch) -> None:
    """Clean and adversarial gradient summed; the embedding matrix is moved and put back from a copy."""
    weight = recipe.embedding.weight
    recipe.loss(batch).backward()
    backup = weight.data.clone()
    _attack(weight, EPSILON)
    recipe.loss(batch).backward()
    weight.data = backup
    recipe.update()


def pgd(recipe: Recipe, batch: Batch) -> None:
    """A clean pass, then K full passes; the clean gradient is kept aside and put back before the last."""
    weight = recipe.embedding.weight
    recipe.loss(batch).backward()
    gradients = {name: p.grad.clone() for name, p in recipe.named.items() if p.grad is not None}
    backup = weight.data.clone()
    for step in range(STEPS):
        _attack(weight, STEP_SIZE)
        r = weight.data - backup
        if torch.norm(r) > EPSILON:
            weight.data = backup + EPSILON * r / torch.norm(r)
        if step < STEPS - 1:
            recipe.model.zero_grad()
        else:
            for name, gradient in gradients.items():
                recipe.named[name].grad = gradient
        recipe.loss(batch).backward()
    weight.data = backup
    recipe.update()


def sam(recipe: Recipe, batch: Batch) -> None:
    """Both steps of the optimizer class: every weight copied, moved, and set to its copy again."""
    recipe.loss(batch).backward()
    trained = [p for p in recipe.named.values() if p.grad is not None]
    norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in trained]), p=2)
    scale, old = RHO / (norm + 1e-12), {}
    with torch.no_grad():
        for p in trained:
            old[p] = p.data.clone()
            p.add_(p.grad * scale.to(p))
    recipe.optimizer.zero_grad()
    recipe.loss(batch).backward()
    for p, value in old.items():
        p.data = value
    recipe.update()


def rdrop(recipe: Recipe, batch: Batch) -> None:
    """Two forward passes of the batch."""
    one, two = recipe.logits(batch), recipe.logits(batch)
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    kl = functional.kl_div(p, two.softmax(-1), reduction="none").sum(-1).mean()
    kl = (kl + functional.kl_div(q, one.softmax(-1), reduction="none").sum(-1).mean()) / 2
    tasks = functional.cross_entropy(one, batch.targets) + functional.cross_entropy(two, batch.targets)
    (0.5 * tasks + ALPHA * kl).backward()
    recipe.update()


def _adapted(recipe: Recipe, batch: Batch, steps: int) -> dict[str, Tensor]:
    """The inner loop with its graph; fused attention has no second derivative."""
    fast: dict[str, Tensor] = dict(recipe.named)
    for _ in range(steps):
        with sdpa_kernel(SDPBackend.MATH):
            loss = recipe.loss(batch.parts["support"], fast)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, allow_unused=True)
        pairs = zip(fast.items(), grads, strict=True)
        fast = {name: p if g is None else p - INNER_LR * g for (name, p), g in pairs}
    return fast


def maml(recipe: Recipe, batch: Batch) -> None:
    recipe.loss(batch, _adapted(recipe, batch, 1)).backward()
    recipe.update()


def maml_freelb(recipe: Recipe, batch: Batch) -> None:
    """Each step of the ascent runs backward to the start, through an adaptation graph that must be kept."""
    fast = _adapted(recipe, batch, 1)
    module: nn.Module = recipe.embedding
    mask = batch.masks["perturbable"]["input_ids"][..., None]
    delta = torch.zeros(*batch.inputs["input_ids"].shape, module.weight.shape[1])
    for step in range(STEPS):
        leaf = delta.requires_grad_()
        handle = module.register_forward_hook(lambda m, args, out, leaf=leaf: out + leaf)
        try:
            loss = recipe.loss(batch, fast) / STEPS
        finally:
            handle.remove()
        loss.backward(retain_graph=step < STEPS - 1)
        g = leaf.grad * mask  # type: ignore[operator]
        delta = leaf.detach() + EPSILON * g / g.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    recipe.update()


RECIPES: dict[str, Callable[[Recipe, Batch], None]] = {
    "plain": plain,
    "fgm": fgm,
    "pgd(3)": pgd,
    "sam": sam,
    "rdrop": rdrop,
    "maml": maml,
    "maml x freelb(3)": maml_freelb,
}
