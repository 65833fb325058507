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
#include "keep/keep.h"
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

void call_cross_entropy(int element, Address logits, int64_t row_stride, Address target, Address weight, int64_t rows,
                        int64_t classes, int64_t ignore_index, double smoothing, int reduction, bool empty_is_zero,
                        Address loss, Address gradient) {
  cross_entropy({static_cast<ElementType>(element), pointer<const void>(logits), row_stride,
                 pointer<const int64_t>(target), pointer<const void>(weight), rows, classes, ignore_index, smoothing,
                 static_cast<Reduction>(reduction), empty_is_zero, pointer<void>(loss), pointer<void>(gradient)});
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
  module.def("scale_rows", &call_scale_rows, without_gil);
  module.def("dropout", &call_dropout, without_gil);
  module.def("embedding_gradient", &call_embedding_gradient, without_gil);
  module.def("gelu", &call_gelu, without_gil);
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
