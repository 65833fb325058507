// The table of what Python can call. Tensors arrive as addresses, shapes and strides, so no torch header is needed;
// the Python side checks types and keeps the tensors alive during the call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <tuple>

#include "common/allocator.h"
#include "common/buffer_pool.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cross_entropy/cross_entropy.h"
#include "dropout/dropout.h"
#include "ema/ema.h"
#include "embedding/embedding.h"
#include "gelu/gelu.h"
#include "kl_pair/kl_pair.h"
#include "keep/keep.h"
#include "matmul/matmul.h"
#include "norm/norm.h"
#include "perturb/perturb.h"
#include "perturb_weights/perturb_weights.h"

namespace py = pybind11;
using namespace hybridengine;

namespace {

using Address = uintptr_t;  // 0 stands for "none"

template <class Type>
Type* pointer(Address address) {
  return reinterpret_cast<Type*>(address);
}

// The arguments of a problem, as hybridengine/kernels/cross_entropy/cpu.py packs them.
using Logits = std::tuple<int, Address, int64_t, int64_t, int64_t>;            // element, values, stride, rows, classes
using Targets = std::tuple<Address, Address, Address, int64_t>;               // labels, soft, weight, ignored
using Shape = std::tuple<double, double, double, double, double, double>;     // smoothing, scale, softcap, z; factors

void call_cross_entropy(const Logits& logits, const Targets& targets, const Shape& shape, Address gradient,
                        int64_t gradient_stride, Address by_loss, int64_t by_loss_stride, Address by_lse, Address loss,
                        Address lse) {
  const auto& [element, values, row_stride, rows, classes] = logits;
  const auto& [labels, soft, weight, ignore_index] = targets;
  const auto& [smoothing, scale, softcap, z_loss, loss_factor, z_factor] = shape;
  const CrossEntropy problem{static_cast<ElementType>(element), pointer<const void>(values), row_stride, rows, classes,
                             pointer<const int64_t>(labels), pointer<const void>(soft), pointer<const void>(weight),
                             ignore_index, smoothing, scale, softcap, z_loss, loss_factor, z_factor,
                             pointer<void>(gradient), gradient_stride};
  cross_entropy(problem, {pointer<const void>(by_loss), by_loss_stride, pointer<const void>(by_lse)},
                pointer<void>(loss), pointer<void>(lse));
}

std::pair<int64_t, double> call_label_totals(int element, Address target, Address weight, int64_t rows, int64_t classes,
                                             int64_t ignore_index) {
  const LabelTotals totals = label_totals(static_cast<ElementType>(element), pointer<const int64_t>(target),
                                          pointer<const void>(weight), rows, classes, ignore_index);
  return {totals.rows, totals.weight};
}

double call_sum_in_order(int element, Address values, int64_t count) {
  return sum_in_order(static_cast<ElementType>(element), pointer<const void>(values), count);
}

void call_scale_rows(int element, Address gradient, int64_t rows, int64_t classes, Address factor,
                     int64_t factor_stride) {
  scale_rows(static_cast<ElementType>(element), pointer<void>(gradient), rows, classes, pointer<const void>(factor),
             factor_stride);
}

void call_dropout(int element, Address input, Address output, int64_t count, uint64_t seed, uint32_t threshold,
                  double scale) {
  dropout({static_cast<ElementType>(element), pointer<const void>(input), pointer<void>(output), count, seed, threshold,
           scale});
}

void call_embedding_gradient(int element, Address gradient, Address ids, Address output, int64_t count, int64_t rows,
                             int64_t width, int64_t padding) {
  embedding_gradient({static_cast<ElementType>(element), pointer<const void>(gradient), pointer<const int64_t>(ids),
                      pointer<void>(output), count, rows, width, padding});
}

void call_gelu(Address input, Address gradient, Address output, int64_t count) {
  gelu({pointer<const float>(input), pointer<const float>(gradient), pointer<float>(output), count});
}

// logits, row stride, gradient
using Side = std::tuple<Address, int64_t, Address>;

KLSide side(const Side& one) {
  const auto& [logits, row_stride, gradient] = one;
  return {pointer<const void>(logits), row_stride, pointer<void>(gradient)};
}

void call_kl_pair(int element, const Side& first, const Side& second, Address mask, int64_t rows, int64_t classes,
                  double temperature, bool symmetric, int reduction, bool empty_is_zero, Address loss) {
  kl_pair({static_cast<ElementType>(element), side(first), side(second), pointer<const bool>(mask), rows, classes,
           temperature, symmetric, static_cast<Reduction>(reduction), empty_is_zero, pointer<void>(loss)});
}

// element, values, row stride, column stride
using Operand = std::tuple<int, Address, int64_t, int64_t>;

void call_matmul(const Operand& first, const Operand& second, int64_t rows, int64_t columns, int64_t depth,
                 const std::tuple<int, Address, int64_t>& result, bool accumulate) {
  const auto& [c_element, c, c_stride] = result;
  const auto matrix = [](const Operand& one) {
    const auto& [element, values, row_stride, column_stride] = one;
    return Matrix{static_cast<ElementType>(element), pointer<const void>(values), row_stride, column_stride};
  };
  matmul({matrix(first), matrix(second), rows, columns, depth, static_cast<ElementType>(c_element), pointer<void>(c),
          c_stride, accumulate});
}

// element, values, count
double call_total_norm(const std::vector<std::tuple<int, Address, int64_t>>& tensors) {
  std::vector<NormPart> parts;
  for (const auto& [element, values, count] : tensors) {
    parts.push_back({static_cast<ElementType>(element), pointer<const void>(values), count});
  }
  return total_norm(parts);
}

// delta, gradient, mask, output, length, width
using Site = std::tuple<Address, Address, Address, Address, int64_t, int64_t>;

void call_perturb_step(int element, int64_t batch, const std::vector<Site>& sites, double step_size,
                       std::optional<double> epsilon, bool linf) {
  PerturbStep step{static_cast<ElementType>(element), batch, {}, step_size,
                   epsilon.value_or(std::numeric_limits<double>::infinity()), linf};
  for (const auto& [delta, gradient, mask, output, length, width] : sites) {
    step.sites.push_back({pointer<const void>(delta), pointer<const void>(gradient), pointer<const bool>(mask),
                          pointer<void>(output), length, width});
  }
  perturb_step(step);
}

// uniform, mask, output, length, width
using Draws = std::tuple<Address, Address, Address, int64_t, int64_t>;

void call_perturb_start(int element, int64_t batch, const std::vector<Draws>& sites, double epsilon, bool linf) {
  PerturbStart start{static_cast<ElementType>(element), batch, {}, epsilon, linf};
  for (const auto& [uniform, mask, output, length, width] : sites) {
    start.sites.push_back({pointer<const void>(uniform), pointer<const bool>(mask), pointer<void>(output), length, width});
  }
  perturb_start(start);
}

// element, gradient's element, weight, gradient, saved, count
using Weight = std::tuple<int, int, Address, Address, Address, int64_t>;

// Returns norm, distance, whether a gradient had a direction, and whether a tensor was touched.
std::tuple<double, double, bool, bool> call_perturb_weights(const std::vector<Weight>& tensors, int rule, double rho,
                                                      double eta) {
  std::vector<MovedWeight> weights;
  for (const auto& [element, gradient_element, weight, gradient, saved, count] : tensors) {
    weights.push_back({static_cast<ElementType>(element), static_cast<ElementType>(gradient_element),
                       pointer<void>(weight), pointer<const void>(gradient), pointer<void>(saved), count});
  }
  const WeightMove move = perturb_weights(weights, static_cast<WeightRule>(rule), rho, eta);
  return {move.norm, move.distance, move.usable, move.moved};
}

// target, source, bytes
void call_copy_all(const std::vector<std::tuple<Address, Address, int64_t>>& tensors) {
  std::vector<CopiedBytes> parts;
  for (const auto& [target, source, bytes] : tensors) {
    parts.push_back({pointer<void>(target), pointer<const void>(source), bytes});
  }
  copy_all(parts);
}

// element, weight's element, average, weight, count
void call_ema_update(const std::vector<std::tuple<int, int, Address, Address, int64_t>>& tensors, double rate) {
  std::vector<Average> averages;
  for (const auto& [element, weight_element, average, weight, count] : tensors) {
    averages.push_back({static_cast<ElementType>(element), static_cast<ElementType>(weight_element),
                        pointer<void>(average), pointer<const void>(weight), count});
  }
  ema_update(averages, rate);
}

py::dict pool_statistics_as_dict() {
  const PoolStatistics statistics = pool_statistics();
  py::dict result;
  result["live_bytes"] = statistics.live_bytes;
  result["idle_bytes"] = statistics.idle_bytes;
  result["limit_bytes"] = statistics.limit_bytes;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def("cross_entropy", &call_cross_entropy, without_gil);
  module.def("label_totals", &call_label_totals, without_gil);
  module.def("sum_in_order", &call_sum_in_order, without_gil);
  module.def("scale_rows", &call_scale_rows, without_gil);
  module.def("dropout", &call_dropout, without_gil);
  module.def("embedding_gradient", &call_embedding_gradient, without_gil);
  module.def("gelu", &call_gelu, without_gil);
  module.def("kl_pair", &call_kl_pair, without_gil);
  module.def("matmul", &call_matmul, without_gil);
  module.def("total_norm", &call_total_norm, without_gil);
  module.def("perturb_step", &call_perturb_step, without_gil);
  module.def("perturb_start", &call_perturb_start, without_gil);
  module.def("perturb_weights", &call_perturb_weights, without_gil);
  module.def("copy_all", &call_copy_all, without_gil);
  module.def("ema_update", &call_ema_update, without_gil);

  module.def("isa", &isa_name);
  module.def("supported_isas", &supported_isas);
  module.def("set_isa", &set_isa);
  module.def("has_thread_pool", &has_thread_pool);

  module.def("tune_allocator", &tune_allocator);
  module.def("pool_statistics", &pool_statistics_as_dict);
  module.def("release_pool", &release_pool);
  py::class_<Buffer>(module, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](Buffer& buffer) {
        return py::buffer_info(buffer.data(), 1, py::format_descriptor<uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(buffer.size())}, {1});
      });
}
