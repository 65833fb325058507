// Matrix products in the tiles of AMX. A thread packs what it multiplies into panels (see tiles.inl) that stay in its
// caches meanwhile. Rows and columns are padded to whole panels by zeros, which are multiplied and not kept.

#include "matmul/matmul.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/buffer_pool.h"
#include "common/isa.h"
#include "common/parallel.h"

#if HE_HAS_AMX
#include <immintrin.h>
#endif

namespace hybridengine {

constexpr const char* kNeedsAmx = "matmul needs a CPU with AMX, in use (HYBRIDENGINE_ISA must not say less than amx)";

#if HE_HAS_AMX
namespace {

#pragma GCC diagnostic push
// GCC bug 105593: its own intrinsics read what they do not set, on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#define HE_TILES_INLINE static inline __attribute__((always_inline))
#include "matmul/tiles.inl"
#undef HE_TILES_INLINE
#pragma GCC pop_options
#pragma GCC diagnostic pop

// What is packed at a time stays in a cache of the second level (1 MiB and more), beside as much of the other operand.
constexpr int64_t kDepthBlock = 512;
constexpr int64_t kPieceBytes = 512 << 10;
constexpr int64_t kColumnGroup = 1024;
// Of threads that sum over parts of the depth, each in memory of its own.
constexpr int64_t kMostPartials = 16;
// Of the largest number of a line: what is smaller is rounded. In the gradient of logits, whose other entries sum to
// the largest, these have at most an eighth of a row's norm.
constexpr float kFine = 1.0f / 64;

#include "matmul/panels.inl"

// The tiles of this thread, while it lives.
struct TilesInUse {
  TilesInUse() { configure_tiles(); }
  ~TilesInUse() { release_tiles(); }
};

// The smaller operand is packed whole, for all threads; each thread packs its pieces of the other for itself.
void multiply_by_pieces(const Matmul& problem, const Operand& whole, const Operand& other) {
  const int64_t whole_panels = panels_of(whole.rows), blocks = ceil_div(problem.depth, kDepthBlock);
  const int64_t block_bytes = whole_panels * whole.panel_bytes(kDepthBlock);
  const Buffer packed(blocks * block_bytes);
  char* const memory = static_cast<char*>(packed.data());
  parallel_for(blocks * whole_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Range depth = block_of(at / whole_panels * kDepthBlock, kDepthBlock, problem.depth);
      const int64_t panel = at % whole_panels;
      whole.pack({panel, 1}, depth, memory + at / whole_panels * block_bytes + panel * whole.panel_bytes(depth.count));
    }
  });
  const int64_t piece = kPieceBytes / other.panel_bytes(kDepthBlock);
  parallel_for(panels_of(other.rows), piece, [&](int64_t begin, int64_t end) {
    const Buffer scratch(piece * other.panel_bytes(kDepthBlock));
    const Sums sums(problem, other.is_b ? problem.rows : piece * kPanel, other.is_b ? piece * kPanel : problem.columns);
    const TilesInUse tiles;
    for (int64_t first = begin; first < end; first += piece) {
      const Range panels = block_of(first, piece, end);
      const Range some = block_of(first * kPanel, panels.count * kPanel, other.rows), all{0, whole.rows};
      const Range rows = other.is_b ? all : some, columns = other.is_b ? some : all;
      const Target target = sums.target(rows, columns);
      for (int64_t block = 0; block < blocks; ++block) {
        const Range depth = block_of(block * kDepthBlock, kDepthBlock, problem.depth);
        other.pack(panels, depth, static_cast<char*>(scratch.data()));
        const Block mine{static_cast<char*>(scratch.data()), other.panel_bytes(depth.count), panels.count};
        const Block shared{memory + block * block_bytes, whole.panel_bytes(depth.count), whole_panels};
        const bool two_parts = whole.two_parts() || other.two_parts();
        target.multiply(other.is_b ? shared : mine, other.is_b ? mine : shared, steps_of(depth.count), two_parts,
                        problem.accumulate || block > 0);
      }
      sums.write(rows, columns);
    }
  });
}

// What a thread has summed over blocks of the depth from `first` on, for a group of columns.
struct Partial {
  int64_t group;
  int64_t first;
  std::unique_ptr<Buffer> sums;
};

void add_partials(const Matmul& problem, const std::vector<Partial>& partials) {
  parallel_for(problem.rows, 1, [&](int64_t begin, int64_t end) {
    const Sums sums(problem, 1, problem.columns);
    for (int64_t row = begin; row < end; ++row) {
      const Range one_row{row, 1}, all{0, problem.columns};
      float* const c = sums.target(one_row, all).c;
      for (const Partial& one : partials) {
        const Range columns = block_of(one.group * kColumnGroup, kColumnGroup, problem.columns);
        const float* const part = static_cast<const float*>(one.sums->data()) + row * columns.count;
        const bool add = problem.accumulate || one.first > 0;
        for (int64_t i = 0; i < columns.count; ++i) {
          c[columns.start + i] = add ? c[columns.start + i] + part[i] : part[i];
        }
      }
      sums.write(one_row, all);
    }
  });
}

// A long depth is shared among the threads, each of which sums for itself.
void multiply_by_depth(const Matmul& problem, const Operand& a, const Operand& b) {
  const int64_t blocks = ceil_div(problem.depth, kDepthBlock), groups = ceil_div(problem.columns, kColumnGroup);
  std::vector<Partial> partials;
  std::mutex mutex;
  parallel_for(groups * blocks, ceil_div(groups * blocks, kMostPartials), [&](int64_t begin, int64_t end) {
    const Range all_rows{0, panels_of(problem.rows)};
    const Buffer a_packed(all_rows.count * a.panel_bytes(kDepthBlock));
    const Buffer b_packed(panels_of(kColumnGroup) * b.panel_bytes(kDepthBlock));
    const TilesInUse tiles;
    Target target{nullptr, 0, problem.rows, 0};
    for (int64_t at = begin; at < end; ++at) {
      const int64_t group = at / blocks, block = at % blocks;
      const Range columns = block_of(group * kColumnGroup, kColumnGroup, problem.columns);
      const bool starts = at == begin || block == 0;
      if (starts) {
        auto sums = std::make_unique<Buffer>(problem.rows * columns.count * sizeof(float));
        target = {static_cast<float*>(sums->data()), columns.count, problem.rows, columns.count};
        const std::lock_guard<std::mutex> lock(mutex);
        partials.push_back({group, block, std::move(sums)});
      }
      const Range depth = block_of(block * kDepthBlock, kDepthBlock, problem.depth);
      a.pack(all_rows, depth, static_cast<char*>(a_packed.data()));
      b.pack({columns.start / kPanel, panels_of(columns.count)}, depth, static_cast<char*>(b_packed.data()));
      target.multiply({static_cast<char*>(a_packed.data()), a.panel_bytes(depth.count), all_rows.count},
                      {static_cast<char*>(b_packed.data()), b.panel_bytes(depth.count), panels_of(columns.count)},
                      steps_of(depth.count), a.two_parts(), !starts);
    }
  });
  std::sort(partials.begin(), partials.end(), [](const Partial& one, const Partial& two) {
    return one.group != two.group ? one.group < two.group : one.first < two.first;
  });
  add_partials(problem, partials);
}

// Of each contiguous line of a float32 matrix, the size from which on its numbers have two parts.
std::vector<float> fine_sizes(const Matrix& matrix, int64_t rows, int64_t columns) {
  const bool by_row = matrix.column_stride == 1;
  const int64_t lines = by_row ? rows : columns, length = by_row ? columns : rows;
  const int64_t stride = by_row ? matrix.row_stride : matrix.column_stride;
  std::vector<float> sizes(lines);
  parallel_for(lines, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const float largest = largest_of(static_cast<const float*>(matrix.values) + line * stride, length);
      sizes[line] = kFine * std::min(largest, std::numeric_limits<float>::max());
    }
  });
  return sizes;
}

void zero(const Matmul& problem) {
  const size_t size = problem.c_element == ElementType::float32 ? sizeof(float) : sizeof(uint16_t);
  for (int64_t row = 0; row < problem.rows && !problem.accumulate; ++row) {
    std::memset(static_cast<char*>(problem.c) + row * problem.c_stride * size, 0, problem.columns * size);
  }
}

}  // namespace

void matmul(const Matmul& problem) {
  if (current_isa() != Isa::amx) throw std::invalid_argument(kNeedsAmx);
  if (problem.accumulate && problem.c_element != ElementType::float32) {
    throw std::invalid_argument("matmul adds to float32 only");
  }
  if (problem.rows == 0 || problem.columns == 0) return;
  if (problem.depth == 0) return zero(problem);
  Operand a{problem.a, false, problem.rows, {}};
  const Operand b{problem.b, true, problem.columns, {}};
  if (a.two_parts()) a.fine = fine_sizes(problem.a, problem.rows, problem.depth);
  if (problem.depth > std::max(problem.rows, problem.columns)) {
    multiply_by_depth(problem, a, b);
  } else if (problem.rows < problem.columns) {
    multiply_by_pieces(problem, a, b);
  } else {
    multiply_by_pieces(problem, b, a);
  }
}

#else

void matmul(const Matmul&) { throw std::invalid_argument(kNeedsAmx); }

#endif

}  // namespace hybridengine
