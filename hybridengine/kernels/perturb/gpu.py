"""The perturbation step on GPUs by Triton; `triton_kernel.py` is loaded when it first runs."""

from __future__ import annotations

import torch

from hybridengine.kernels import operators, triton_runtime
from hybridengine.kernels.perturb.operator import run_triton as run
from hybridengine.kernels.perturb.operator import why_not_these
from hybridengine.kernels.perturb.site import Site

__all__ = ["run", "why_missing", "why_not", "why_slower"]

why_missing = triton_runtime.why_missing
why_slower = triton_runtime.why_slower


def why_not(sites: list[Site]) -> str | None:
    """Say why these arguments cannot run here."""
    reason = triton_runtime.why_not_on(*(one for site in sites for one in site))
    return reason or why_not_these(sites, (torch.float32, torch.bfloat16, torch.float16))


operators.implement("perturb_step", "triton", operators.later("hybridengine.kernels.perturb.triton_kernel", "launch"))
