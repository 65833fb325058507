#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cuda/element.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/rounding.cuh"

// Cross-entropy of one row by one block. Everything is computed in float.
//
// A row x of V logits is first bent and scaled: y = scale x, or y = softcap tanh(scale x / softcap). With q_j
// the weight that the target gives class j,
//
//   labels        q = (1 - e) w_t onehot(t) + (e / V) w        e: label smoothing, w: class weights
//   soft targets  q_j = w_j ((1 - e) t_j + e / V)
//
// M = max y, S = sum exp(y - M), lse = M + log S, p = exp(y - lse) and h = sum q, the loss and its gradient
// are
//
//   l = h lse - sum q_j y_j = sum q_j ((M - y_j) + log S)
//   dl / dx_j = y'_j (h p_j - q_j)
//
// The second form of l is the one that is computed: for logits around 1e30 the first is 0. A row of nothing
// but -inf, or with +inf or NaN in it, has no softmax: S is 0 or NaN, and loss, lse and gradient become NaN.
// lse itself has the gradient y'_j p_j, so a term z lse^2 only adds 2 z lse to the factor of p_j.

namespace hybridengine {

enum class TargetKind : int { labels = 0, soft = 1, soft_float = 2 };

// The arguments of both passes; hybridengine/kernels/cross_entropy/cuda.py has the same struct. Strides in
// elements.
struct CrossEntropyProblem {
  int element;      // CudaElement of logits and gradient
  int target_kind;  // TargetKind; soft targets have the logits' type or are float
  int64_t rows;
  int64_t classes;
  const void* logits;  // [rows, classes], each row contiguous
  int64_t logits_stride;
  const void* target;  // int64 [rows], or [rows, classes]
  int64_t target_stride;
  const float* weight;  // [classes] or null
  double weight_sum;    // of the weights; the number of classes where there are none
  int64_t ignore_index;
  double smoothing;
  double scale;
  double softcap;  // 0 for none
  double z_loss;
  const float* factors;    // on the device: s of the loss, sz of the z term
  int64_t factors_stride;  // to the next row's; 0 where all rows share them
  float* loss;             // [rows]; forward only
  float* lse;              // [rows]; the forward pass writes it, the backward pass reads it
  const float* grad_loss;  // [rows], or one for all where its stride is 0; backward only
  int64_t grad_loss_stride;
  const float* grad_lse;  // [rows] or null; backward only
  void* gradient;         // [rows, classes] or null; may be the logits themselves
  int64_t gradient_stride;
  unsigned long long* flag;  // three numbers: 1 + row, label, classes of the first bad label; or null
};

// What every row shares, rounded once.
struct Constants {
  float kept;        // 1 - e
  float uniform;     // e / V
  float dense_mass;  // (e / V) sum w: what smoothing adds to h
  float scale;
  float inner;  // scale / softcap
  float softcap;
  float z_loss;
};

// The targets of a row as a type. A `dense` one gives weight to every class.
struct Labels {
  using Element = float;  // of no soft target
  static constexpr bool dense = false, soft = false;
};
struct SmoothedLabels {
  using Element = float;
  static constexpr bool dense = true, soft = false;
};
template <class SoftElement>
struct SoftTargets {
  using Element = SoftElement;
  static constexpr bool dense = true, soft = true;
};

template <int count>
struct Curve {
  Values<count> y;
  Values<count> slope;  // y'
};

template <int count>
__device__ __forceinline__ Curve<count> bend(const Values<count>& x, const Constants& constants) {
  Curve<count> curve;
  if (constants.softcap > 0.0f) {
#pragma unroll
    for (int lane = 0; lane < count; ++lane) {
      const float bent = tanhf(rounded_product(constants.inner, x.at[lane]));
      curve.y.at[lane] = rounded_product(constants.softcap, bent);
      curve.slope.at[lane] = constants.scale * (1.0f - bent * bent);
    }
  } else {
#pragma unroll
    for (int lane = 0; lane < count; ++lane) {
      curve.y.at[lane] = rounded_product(constants.scale, x.at[lane]);
      curve.slope.at[lane] = constants.scale;
    }
  }
  return curve;
}

template <class Element, class Target>
struct Row {
  const Element* logits;
  const typename Target::Element* soft;  // null for labels
  Element* gradient;                     // null for none
  const float* weight;                   // null for none
  int classes;
  RowSplit split;
  int label;   // -1 for soft targets
  float hard;  // what the label has beyond its dense share: (1 - e) w_t, 0 for soft targets
};

// The dense part of q.
template <int count, class Element, class Target>
__device__ __forceinline__ Values<count> dense_shares(const Row<Element, Target>& row, int column,
                                                      const Constants& constants) {
  Values<count> shares;
  if constexpr (Target::soft) shares = load_values<count>(row.soft + column);
#pragma unroll
  for (int lane = 0; lane < count; ++lane) {
    const float target = Target::soft ? constants.kept * shares.at[lane] : 0.0f;
    const float weight = row.weight ? row.weight[column + lane] : 1.0f;
    shares.at[lane] = weight * (target + constants.uniform);
  }
  return shares;
}

// Running sums against the largest y so far. From `gap` comes sum q_j (M - y_j): it is never negative, and
// raising M by d adds d sum q_j.
template <bool dense>
struct RowSums {
  float maximum;
  float exponentials;  // sum of exp(y - maximum)
};
template <>
struct RowSums<true> {
  float maximum;
  float exponentials;
  float gap;   // sum of q (maximum - y)
  float mass;  // sum of q
};

// What is subtracted: not the maximum while nothing but -inf was seen, as -inf - -inf is NaN.
__device__ __forceinline__ float shift_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// q times a distance. A class with q = 0 adds nothing, whatever its logit: 0 * inf would be NaN.
__device__ __forceinline__ float expected(float share, float distance) {
  return share == 0.0f ? 0.0f : share * distance;
}

template <bool dense>
__device__ __forceinline__ void raise(RowSums<dense>& sums, float maximum) {
  const float shift = shift_of(maximum);
  // A rounded product, so that two halves of a warp that combine the same sums get the same bits.
  sums.exponentials = rounded_product(sums.exponentials, fast_exp(sums.maximum - shift));
  if constexpr (dense) sums.gap += sums.mass * (shift - shift_of(sums.maximum));
  sums.maximum = maximum;
}

struct CombineSums {
  template <bool dense>
  __device__ __forceinline__ RowSums<dense> operator()(RowSums<dense> left, RowSums<dense> right) const {
    const float maximum = fmaxf(left.maximum, right.maximum);
    raise(left, maximum);
    raise(right, maximum);
    left.exponentials += right.exponentials;
    if constexpr (dense) {
      left.gap += right.gap;
      left.mass += right.mass;
    }
    return left;
  }
};

// The first read of a row. The maximum ignores NaN, which then comes through the exponentials; so does +inf.
template <class Element, class Target, class Shared>
__device__ __forceinline__ RowSums<Target::dense> sum_row(const Row<Element, Target>& row,
                                                          const Constants& constants, Shared& shared) {
  constexpr bool dense = Target::dense;
  RowSums<dense> nothing{};
  nothing.maximum = -INFINITY;
  RowSums<dense> sums = nothing;
  visit_row<Element>(row.split, row.classes, [&](int column, auto size) {
    constexpr int count = decltype(size)::value;
    const Values<count> y = bend(load_values<count>(row.logits + column), constants).y;
    float largest = y.at[0];
#pragma unroll
    for (int lane = 1; lane < count; ++lane) largest = fmaxf(largest, y.at[lane]);
    if (largest > sums.maximum) raise(sums, largest);
    const float shift = shift_of(sums.maximum);
#pragma unroll
    for (int lane = 0; lane < count; ++lane) sums.exponentials += fast_exp(y.at[lane] - shift);
    if constexpr (dense) {
      const Values<count> shares = dense_shares<count>(row, column, constants);
#pragma unroll
      for (int lane = 0; lane < count; ++lane) {
        sums.gap += expected(shares.at[lane], shift - y.at[lane]);
        sums.mass += shares.at[lane];
      }
    }
  });
  return block_reduce(sums, nothing, shared, CombineSums{});
}

// The second read: gradient_j = y'_j (by_exponential exp(y_j - shift) - by_share q_j). Each thread writes
// what it alone reads, so the gradient may lie where the logits do. The label's entry is a difference of
// numbers near each other (p - 1 of a confident row): it is formed in float and rounded once.
template <class Element, class Target>
__device__ __forceinline__ void write_gradient(const Row<Element, Target>& row, const Constants& constants,
                                               float shift, float by_exponential, float by_share) {
  visit_row<Element>(row.split, row.classes, [&](int column, auto size) {
    constexpr int count = decltype(size)::value;
    const Curve<count> curve = bend(load_values<count>(row.logits + column), constants);
    Values<count> shares{};
    if constexpr (Target::dense) shares = dense_shares<count>(row, column, constants);
    Values<count> gradient;
#pragma unroll
    for (int lane = 0; lane < count; ++lane) {
      float share = shares.at[lane];
      if (!Target::soft && column + lane == row.label) share += row.hard;
      const float value = by_exponential * fast_exp(curve.y.at[lane] - shift) - by_share * share;
      gradient.at[lane] = curve.slope.at[lane] * value;
    }
    store_values<count>(row.gradient + column, gradient);
  });
}

template <class Element, class Target>
__device__ __forceinline__ void zero_gradient(const Row<Element, Target>& row) {
  visit_row<Element>(row.split, row.classes, [&](int column, auto size) {
    constexpr int count = decltype(size)::value;
    store_values<count>(row.gradient + column, Values<count>{});
  });
}

}  // namespace hybridengine
