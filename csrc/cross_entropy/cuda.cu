// Cross-entropy on NVIDIA GPUs: one block a row, which is read once for its sums and once more where the
// gradient is wanted. Derivations stand in cuda.cuh.

#include "cross_entropy/cuda.cuh"

namespace hybridengine {
namespace {

constexpr int kMostThreads = 512;
// Blocks at once on a multiprocessor: bounds the registers of a thread to 32 or 42, for more reads in flight.
template <class Target>
constexpr int kBlocksAtOnce = Target::dense ? 3 : 4;

// Notes the first bad label of the launch; the host looks when it next waits for the device.
__device__ __forceinline__ void note_bad_label(const CrossEntropyProblem& problem, int64_t index,
                                               int64_t label) {
  if (problem.flag == nullptr || threadIdx.x != 0) return;
  const auto number = static_cast<unsigned long long>(index + 1);
  if (atomicCAS(problem.flag, 0ull, number) != 0ull) return;
  problem.flag[1] = static_cast<unsigned long long>(label);
  problem.flag[2] = static_cast<unsigned long long>(problem.classes);
}

// Finds everything about a row; false where it does not count. The offsets are of 64 bits: rows * classes may
// exceed 2^31.
template <class Element, class Target>
__device__ __forceinline__ bool open_row(const CrossEntropyProblem& problem, const Constants& constants,
                                         int64_t index, Row<Element, Target>& row) {
  using Soft = typename Target::Element;
  row.logits = static_cast<const Element*>(problem.logits) + index * problem.logits_stride;
  row.soft =
      Target::soft ? static_cast<const Soft*>(problem.target) + index * problem.target_stride : nullptr;
  row.gradient =
      problem.gradient ? static_cast<Element*>(problem.gradient) + index * problem.gradient_stride : nullptr;
  row.weight = problem.weight;
  row.classes = static_cast<int>(problem.classes);
  row.split = split_row(row.logits, row.classes);
  if (!is_aligned_at(row.soft, row.split.head) || !is_aligned_at(row.gradient, row.split.head))
    row.split = {0, 0};
  row.label = -1;
  row.hard = 0.0f;
  if constexpr (!Target::soft) {
    const int64_t label = static_cast<const int64_t*>(problem.target)[index * problem.target_stride];
    if (label == problem.ignore_index) return false;
    if (label < 0 || label >= problem.classes) {
      note_bad_label(problem, index, label);
      return false;
    }
    row.label = static_cast<int>(label);
    row.hard = constants.kept * (row.weight ? row.weight[label] : 1.0f);
  }
  return true;
}

template <class Element, class Target>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<Target>)
    forward_rows(const CrossEntropyProblem problem, const Constants constants) {
  HE_SHARED(RowSums<Target::dense>, shared, kMostWarps);
  const int64_t index = blockIdx.x;
  Row<Element, Target> row;
  if (!open_row(problem, constants, index, row)) {  // it contributes nothing, whatever it holds, NaN included
    if (threadIdx.x == 0) problem.loss[index] = problem.lse[index] = 0.0f;
    if (row.gradient) zero_gradient(row);
    return;
  }
  // Read before the barrier in sum_row: after it the gradient may take the logits' place.
  const float label_y = Target::soft ? 0.0f : bend(load_values<1>(row.logits + row.label), constants).y.at[0];
  const auto sums = sum_row(row, constants, shared);
  const float log_sum = sums.exponentials > 0.0f ? logf(sums.exponentials) : NAN;
  const float lse = sums.maximum + log_sum;
  const float* const factors = problem.factors + index * problem.factors_stride;
  const float s = factors[0];
  // Left out where it is off: 0 * inf would be NaN.
  const float z = constants.z_loss != 0.0f ? factors[1] * constants.z_loss : 0.0f;
  float loss = 0.0f, mass = row.hard;
  if constexpr (!Target::soft) loss = expected(row.hard, sums.maximum - label_y) + row.hard * log_sum;
  if constexpr (Target::dense) {
    const float dense = Target::soft ? sums.mass : constants.dense_mass;
    loss += sums.gap + dense * log_sum;
    mass += dense;
  }
  if (threadIdx.x == 0) {
    problem.loss[index] = s * loss + (z != 0.0f ? z * lse * lse : 0.0f);
    problem.lse[index] = lse;
  }
  if (row.gradient == nullptr) return;
  const float by_probability = s * mass + (z != 0.0f ? 2.0f * z * lse : 0.0f);
  // p = exp(y - M) / S: exp(y - lse) would carry the rounding error of lse, which grows with M.
  write_gradient(row, constants, shift_of(sums.maximum), by_probability / sums.exponentials, s);
}

template <class Element, class Target>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<Target>)
    backward_rows(const CrossEntropyProblem problem, const Constants constants) {
  HE_SHARED(float, shared, kMostWarps);
  const int64_t index = blockIdx.x;
  Row<Element, Target> row;
  if (!open_row(problem, constants, index, row)) return zero_gradient(row);
  float mass = row.hard + constants.dense_mass;
  if constexpr (Target::soft) {
    mass = 0.0f;
    visit_row<Element>(row.split, row.classes, [&](int column, auto size) {
      constexpr int count = decltype(size)::value;
      const Values<count> shares = dense_shares<count>(row, column, constants);
#pragma unroll
      for (int lane = 0; lane < count; ++lane) mass += shares.at[lane];
    });
    mass = block_reduce(mass, 0.0f, shared, Sum{});
  }
  const float lse = problem.lse[index];
  const float* const factors = problem.factors + index * problem.factors_stride;
  const float s = factors[0];
  const float z = constants.z_loss != 0.0f ? factors[1] * constants.z_loss : 0.0f;
  const float incoming = problem.grad_loss[index * problem.grad_loss_stride];
  const float by_lse = problem.grad_lse ? problem.grad_lse[index] : 0.0f;
  const float by_probability = incoming * (s * mass + (z != 0.0f ? 2.0f * z * lse : 0.0f)) + by_lse;
  write_gradient(row, constants, lse, by_probability, incoming * s);
}

Constants round_constants(const CrossEntropyProblem& problem) {
  const double uniform = problem.smoothing / static_cast<double>(problem.classes);
  const double inner = problem.softcap > 0.0 ? problem.scale / problem.softcap : 0.0;
  return {static_cast<float>(1.0 - problem.smoothing),
          static_cast<float>(uniform),
          static_cast<float>(uniform * problem.weight_sum),
          static_cast<float>(problem.scale),
          static_cast<float>(inner),
          static_cast<float>(problem.softcap),
          static_cast<float>(problem.z_loss)};
}

// No more warps than have something to read.
int threads_for(int64_t classes, int pack_size) {
  const int64_t warps = (classes + kWarpSize * pack_size - 1) / (kWarpSize * pack_size);
  return static_cast<int>(warps * kWarpSize < kMostThreads ? warps * kWarpSize : kMostThreads);
}

template <class Element, class Target>
cudaError_t launch_rows(const CrossEntropyProblem& problem, bool is_forward, cudaStream_t stream) {
  auto* const kernel = is_forward ? &forward_rows<Element, Target> : &backward_rows<Element, Target>;
  const int threads = threads_for(problem.classes, kPackSize<Element>);
  const Constants constants = round_constants(problem);
  HE_LAUNCH(kernel, static_cast<unsigned>(problem.rows), threads, stream, problem, constants);
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_targets(const CrossEntropyProblem& problem, bool is_forward, cudaStream_t stream) {
  const auto kind = static_cast<TargetKind>(problem.target_kind);
  if (kind == TargetKind::labels) {
    return problem.smoothing == 0.0 ? launch_rows<Element, Labels>(problem, is_forward, stream)
                                    : launch_rows<Element, SmoothedLabels>(problem, is_forward, stream);
  }
  if (kind == TargetKind::soft)
    return launch_rows<Element, SoftTargets<Element>>(problem, is_forward, stream);
  if (kind == TargetKind::soft_float)
    return launch_rows<Element, SoftTargets<float>>(problem, is_forward, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch(const CrossEntropyProblem* problem, size_t size, bool is_forward, void* stream) {
  // A caller whose struct is another must not be believed. Columns are counted in int, with room for a last
  // stride.
  if (size != sizeof(CrossEntropyProblem)) return cudaErrorInvalidValue;
  if (problem->rows > INT32_MAX || problem->classes > INT32_MAX - 65536) return cudaErrorInvalidValue;
  if (problem->rows <= 0 || problem->classes <= 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (static_cast<CudaElement>(problem->element)) {
    case CudaElement::float32:
      return launch_targets<float>(*problem, is_forward, queue);
    case CudaElement::bfloat16:
      return launch_targets<Bf16>(*problem, is_forward, queue);
    case CudaElement::float16:
      return launch_targets<Half>(*problem, is_forward, queue);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace hybridengine

HE_EXPORT int hybridengine_cross_entropy_forward(const hybridengine::CrossEntropyProblem* problem,
                                                 size_t size, void* stream) {
  return static_cast<int>(hybridengine::launch(problem, size, true, stream));
}

HE_EXPORT int hybridengine_cross_entropy_backward(const hybridengine::CrossEntropyProblem* problem,
                                                  size_t size, void* stream) {
  return static_cast<int>(hybridengine::launch(problem, size, false, stream));
}
