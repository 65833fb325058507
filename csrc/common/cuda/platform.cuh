#pragma once

// The CUDA runtime, or what the tests put in its place to run the same kernels on a CPU
// (tests/kernels/emulation).
//
// Kernels are launched by HE_LAUNCH and declare shared memory by HE_SHARED: the emulation turns the first
// into loops over fibers and the second into arrays that notice a missing barrier.

#ifdef HE_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define HE_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define HE_SHARED(Type, name, count) __shared__ Type name[count]
#define HE_CHECK_ALIGNED(pointer, bytes)
#endif

// A function that Python finds in the library; everything else in it is hidden.
#define HE_EXPORT extern "C" __attribute__((visibility("default")))
