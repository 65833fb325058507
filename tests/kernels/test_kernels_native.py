"""The native library itself: the buffer pool, the allocator, what it links."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine import kernels
from hybridengine.kernels import native
from hybridengine.kernels.native import empty

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

MIB = 1 << 20
pooled_only = pytest.mark.skipif(os.environ.get("HYBRIDENGINE_POOL") == "0", reason="the pool is switched off")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@settings(max_examples=25, deadline=None)
@given(actions=st.lists(st.one_of(st.integers(1, 9), st.just(0)), max_size=20), seed=st.integers(0, 1000))
def test_no_two_living_tensors_share_memory(actions: list[int], seed: int) -> None:
    """Take buffers of 1 to 9 MiB and drop random ones; every living one keeps what was written into it."""
    generator = torch.Generator().manual_seed(seed)
    living: list[tuple[torch.Tensor, int]] = []
    for number, size in enumerate(actions):
        if size == 0 and living:
            del living[int(torch.randint(len(living), (), generator=generator))]
            continue
        tensor = empty((max(size, 1), MIB // 4), torch.float32)
        tensor[:, ::1024] = number  # one write a page
        living.append((tensor[:, ::1024], number))  # only a view is kept: it must keep the buffer alive
    for view, number in living:
        assert bool((view == number).all())
    spans = sorted((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t, _ in living)
    assert all(start + size <= following for (start, size), (following, _) in pairwise(spans))


@pooled_only
def test_buffers_are_reused_and_released() -> None:
    kernels.release_pool()
    before = kernels.pool_report().live_bytes
    first = empty((4 * MIB,), torch.float32)
    address = first.data_ptr()
    assert address % (2 * MIB) == 0, "huge pages need an aligned start"
    assert kernels.pool_report().live_bytes - before == 16 * MIB
    del first
    gc.collect()
    assert kernels.pool_report().idle_bytes == 16 * MIB
    assert empty((4 * MIB,), torch.float32).data_ptr() == address
    assert kernels.release_pool() == 16 * MIB and kernels.pool_report().idle_bytes == 0


@pooled_only
def test_the_gradient_is_pooled_and_outlives_its_graph() -> None:
    logits = torch.randn(64, 9000, requires_grad=True)
    before = kernels.pool_report().live_bytes
    kernels.cross_entropy(logits, torch.arange(64)).backward()
    assert kernels.pool_report().live_bytes > before
    assert logits.grad is not None
    kept = logits.grad.clone()
    other = [torch.randn(64, 9000, requires_grad=True) for _ in range(3)]
    for one in other:
        kernels.cross_entropy(one, torch.arange(64)).backward()
    assert torch.equal(logits.grad, kept)


@pooled_only
def test_many_threads_take_and_give() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            tensor = empty((MIB,), torch.int32)
            tensor[::1024] = number
            if not bool((tensor[::1024] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pooled_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_pool_survives_a_fork() -> None:
    code = """
import os, threading, warnings
warnings.simplefilter("ignore")
import torch
from hybridengine.kernels.native import empty
stop = threading.Event()
def churn():
    while not stop.is_set():
        empty((1 << 20,), torch.float32)
thread = threading.Thread(target=churn); thread.start()
parent = empty((1 << 20,), torch.float32); parent.fill_(1)
for _ in range(20):
    child = os.fork()
    if child == 0:
        mine = empty((1 << 20,), torch.float32); mine[:10] = 2; parent[:10] = 3
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set(); thread.join()
assert float(parent[0]) == 1
print("ok")
"""
    assert run_python(code) == "ok"


def test_the_pool_has_a_limit_and_the_allocator_reports() -> None:
    code = """
import torch
from hybridengine import kernels
from hybridengine.kernels.native import empty
many = [empty((4 << 20,), torch.float32) for _ in range(4)]
del many
print(kernels.pool_report().idle_bytes >> 20, kernels.pool_report().limit_bytes >> 20)
print(kernels.tune_allocator())
"""
    pool, allocator = run_python(code, HYBRIDENGINE_POOL="40").splitlines()
    assert pool == "32 40"
    assert ("changed=True" in allocator) == ("M_MMAP_MAX" in allocator)


def test_threads_come_from_torch() -> None:
    assert native.module().has_thread_pool()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_library_links_neither_torch_nor_openmp() -> None:
    spec = find_spec("hybridengine.kernels._native")
    assert spec is not None and spec.origin is not None
    listing = subprocess.run(["readelf", "-d", spec.origin], capture_output=True, text=True, check=True).stdout
    needed = [line for line in listing.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "gomp" in line or "torch" in line or "omp" in line.lower()]
