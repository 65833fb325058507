// Operands as panels of tiles, and the part of C that packed panels are multiplied into. Included by cpu.cpp.

int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t panels_of(int64_t rows) { return ceil_div(rows, kPanel); }
int64_t steps_of(int64_t depth) { return ceil_div(depth, kStep); }

struct Range {
  int64_t start;
  int64_t count;
};

Range block_of(int64_t start, int64_t size, int64_t total) { return {start, std::min(size, total - start)}; }

// One operand as panels. Rows are those of A or the columns of B.
struct Operand {
  Matrix matrix;
  bool is_b;
  int64_t rows;
  std::vector<float> fine;  // of each contiguous line, the size of numbers that have two parts; empty: none have

  bool two_parts() const { return matrix.element == ElementType::float32; }
  int64_t row_stride() const { return is_b ? matrix.column_stride : matrix.row_stride; }
  int64_t depth_stride() const { return is_b ? matrix.row_stride : matrix.column_stride; }

  // Tiles, then a byte for each step that says which low tiles count.
  int64_t step_bytes() const { return (two_parts() ? 4 : 2) * kTileBytes; }
  int64_t panel_bytes(int64_t depth) const {
    const int64_t steps = steps_of(depth);
    return steps * step_bytes() + (two_parts() ? ceil_div(steps, 64) * 64 : 0);
  }

  template <class Element>
  void pack_panel(int64_t row, Range depth, char* panel) const {
    const bool along_depth = depth_stride() == 1;
    const auto* const values = static_cast<const Element*>(matrix.values);
    char* low = panel + steps_of(depth.count) * step_bytes();
    for (int64_t start = 0; start < depth.count; start += kStep) {
      int has_low = 0;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = row + half * kTileRows;
        const float* const line = fine.empty() ? nullptr : fine.data() + (along_depth ? first : depth.start + start);
        const TileSource<Element> from{values + first * row_stride() + (depth.start + start) * depth_stride(),
                                       along_depth ? row_stride() : depth_stride(), along_depth,
                                       std::min(std::max<int64_t>(rows - first, 0), kTileRows),
                                       std::min(depth.count - start, kStep), line};
        has_low |= pack_tile(from, is_b, panel + half * kTileBytes, panel + (2 + half) * kTileBytes) << half;
      }
      if (two_parts()) *low++ = static_cast<char>(has_low);
      panel += step_bytes();
    }
  }

  void pack(Range panels, Range depth, char* block) const {
    for (int64_t panel = 0; panel < panels.count; ++panel, block += panel_bytes(depth.count)) {
      const int64_t row = (panels.start + panel) * kPanel;
      if (two_parts()) {
        pack_panel<float>(row, depth, block);
      } else {
        pack_panel<uint16_t>(row, depth, block);
      }
    }
  }
};

// Packed panels of an operand.
struct Block {
  const char* panels;
  int64_t panel_bytes;
  int64_t count;
};

// Part of C, or of sums for it.
struct Target {
  float* c;
  int64_t stride;
  int64_t rows;
  int64_t columns;

  // A panel of C that is not whole goes through memory of its own.
  template <bool kTwoParts>
  void multiply_panel(int64_t row, int64_t column, const char* a, const char* b, int64_t steps, bool accumulate) const {
    const auto* const low = reinterpret_cast<const uint8_t*>(a + steps * (kTwoParts ? 4 : 2) * kTileBytes);
    const int64_t height = std::min(rows - row, kPanel), width = std::min(columns - column, kPanel);
    float* const corner = c + row * stride + column;
    if (height == kPanel && width == kPanel) {
      multiply_panels<kTwoParts>(a, low, b, steps, corner, stride * sizeof(float), accumulate);
      return;
    }
    alignas(64) float whole[kPanel * kPanel] = {};
    for (int64_t i = 0; accumulate && i < height; ++i) {
      std::memcpy(whole + i * kPanel, corner + i * stride, width * sizeof(float));
    }
    multiply_panels<kTwoParts>(a, low, b, steps, whole, kPanel * sizeof(float), accumulate);
    for (int64_t i = 0; i < height; ++i) {
      std::memcpy(corner + i * stride, whole + i * kPanel, width * sizeof(float));
    }
  }

  // Neighbouring columns are written one after the other.
  template <bool kTwoParts>
  void multiply(const Block& a, const Block& b, int64_t steps, bool accumulate) const {
    for (int64_t i = 0; i < a.count; ++i) {
      for (int64_t j = 0; j < b.count; ++j) {
        multiply_panel<kTwoParts>(i * kPanel, j * kPanel, a.panels + i * a.panel_bytes, b.panels + j * b.panel_bytes,
                                  steps, accumulate);
      }
    }
  }

  void multiply(const Block& a, const Block& b, int64_t steps, bool two_parts, bool accumulate) const {
    two_parts ? multiply<true>(a, b, steps, accumulate) : multiply<false>(a, b, steps, accumulate);
  }
};

// Where a thread sums a piece of C: in C, or in memory of its own until it is rounded.
class Sums {
 public:
  Sums(const Matmul& problem, int64_t rows, int64_t columns) : problem_(problem) {
    if (problem.c_element != ElementType::float32) own_ = std::make_unique<Buffer>(rows * columns * sizeof(float));
  }

  Target target(Range rows, Range columns) const {
    if (own_) return {static_cast<float*>(own_->data()), columns.count, rows.count, columns.count};
    float* const c = static_cast<float*>(problem_.c) + rows.start * problem_.c_stride + columns.start;
    return {c, problem_.c_stride, rows.count, columns.count};
  }

  void write(Range rows, Range columns) const {
    if (!own_) return;
    for (int64_t row = 0; row < rows.count; ++row) {
      round_to(static_cast<uint16_t*>(problem_.c) + (rows.start + row) * problem_.c_stride + columns.start,
               static_cast<float*>(own_->data()) + row * columns.count, columns.count);
    }
  }

 private:
  const Matmul& problem_;
  std::unique_ptr<Buffer> own_;
};
