"""Run by test_kernels_perturb_triton.py in processes of their own, for Triton reads its environment once.

python perturb_triton.py interpret COUNT     random steps in Triton's interpreter against the exact ones
python perturb_triton.py compile ARCH...     every kernel for these compute capabilities, without a GPU
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from interpreter import repair_loop_bounds
from perturb_cases import Case, cases, check
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels.perturb import triton_kernel as code

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def interpret(count: int) -> None:
    repair_loop_bounds()
    code.CHUNK = 256  # so that small groups need several chunks

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(DTYPES, [1, 3, 19, 100, 300]), fewest_groups=st.sampled_from([1, 100]))
    def run(case: Case, fewest_groups: int) -> None:
        code.FEWEST_GROUPS = fewest_groups
        assume(not any(map(subnormal_in_bfloat16, (*case.delta.values(), *case.gradient.values()))))
        check(case, "triton", truncates=True)

    run()
    for code.FEWEST_GROUPS in (1, 100):
        one_of_each_trouble()
    print(kernels.used()["perturb"]["triton"])


def subnormal_in_bfloat16(tensor: Tensor) -> bool:
    """Whether a number is one that the interpreter reads as 0, which a GPU does not."""
    size = tensor.abs()
    small = (size > 0) & (size < torch.finfo(torch.bfloat16).smallest_normal)
    return tensor.dtype == torch.bfloat16 and bool(small.any())


def one_of_each_trouble() -> None:
    """Sequences as in test_kernels_perturb.py, whose expectations are exact, whole and in chunks."""
    for width in (4, 400):
        delta, gradient, mask = torch.full((5, 3, width), 0.1), torch.randn(5, 3, width), torch.ones(5, 3)
        mask[4, 2] = delta[4, 2] = gradient[0] = 0
        gradient[1, 0, 0], gradient[2, 2, 3], gradient[4, 2, 0] = math.nan, -math.inf, math.nan
        moved = kernels.perturb_step(delta, gradient, mask, step_size=1.0, epsilon=0.01, impl="triton")
        assert torch.equal(moved[1:3], delta[1:3]), "not even projected"
        torch.testing.assert_close(moved[[0, 3, 4]].flatten(1).norm(dim=1), torch.full((3,), 0.01))
        doubled = kernels.perturb_step(delta, gradient * 2, mask, step_size=1.0, epsilon=0.01, impl="triton")
        assert torch.equal(moved, doubled), "a loss scale of a power of two changes nothing"
        gradient[3:] *= torch.tensor([1e-3, 1e3, 1.0]).view(1, 3, 1)  # chunks are measured at scales of their own
        moved = kernels.perturb_step(delta * 0, gradient, mask, step_size=1.0, impl="triton")
        torch.testing.assert_close(moved[3:].flatten(1).norm(dim=1), torch.ones(2))


def kernels_to_compile() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    tensors = {"delta": "*ELEMENT", "gradient": "*ELEMENT", "mask": "*u8"}
    counts = {"length": "i32", "first": "i32", "parts": "i32", "groups": "i32"}
    sizes = {"step_size": "fp32", "epsilon": "fp32"}
    shape = {"WIDTH": 768, "BLOCK": code.CHUNK}
    choices = [{"LINF": linf, "PROJECT": projects} for linf in (False, True) for projects in (False, True)]
    measures = {"measures": "*fp32", "moved": "*fp32"}
    first = {name: counts[name] for name in ("length", "first", "parts", "groups")}
    found = [
        ("gradient", code._measure_gradient, {**tensors, "measures": "*fp32", **first}, shape),
        ("moved", code._measure_moved, {**tensors, **measures, **first, "step_size": "fp32"}, {**shape, "PARTS": 32}),
    ]
    out, without_first = {"out": "*ELEMENT"}, {name: counts[name] for name in ("length", "parts", "groups")}
    for chosen in choices:
        for name, kernel in (("whole", code._whole), ("looped", code._looped)):
            found.append((name, kernel, {**tensors, **out, "length": "i32", **sizes}, {**shape, **chosen}))
        types = {**tensors, **out, **measures, **without_first, **sizes}
        found.append(("write", code._write, types, {**shape, **chosen, "PARTS": 32}))
    return found


def compile_for(architectures: list[int]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    done = 0
    for number, (name, kernel, types, constants) in enumerate(kernels_to_compile()):
        element = ("fp32", "bf16", "fp16")[number % 3]
        signature = {key: value.replace("ELEMENT", element) for key, value in types.items()}
        signature = {key: signature.get(key, "constexpr") for key in kernel.arg_names}
        assert {key for key, kind in signature.items() if kind == "constexpr"} == set(constants), name
        for architecture in architectures:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
            assert f".target sm_{architecture}" in made.asm["ptx"] and made.asm["cubin"]
            done += 1
    print(done)


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret(int(sys.argv[2]))
    else:
        compile_for(list(map(int, sys.argv[2:])))
