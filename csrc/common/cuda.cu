// What the library says of itself and of the device, for hybridengine/kernels/cuda_library.py.

#include "common/cuda/platform.cuh"

namespace hybridengine {
namespace {

__global__ void do_nothing() {}

}  // namespace
}  // namespace hybridengine

// Whether the current device can run this library: 0, or an error of the CUDA runtime. Asks for a kernel's
// attributes, because only loading one shows that the driver is new enough and that there is code for the
// device.
HE_EXPORT int hybridengine_cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, hybridengine::do_nothing);
  cudaGetLastError();  // an error that is told must not stay for the next caller
  return static_cast<int>(error);
}

HE_EXPORT const char* hybridengine_cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
