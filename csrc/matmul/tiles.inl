// Packing of matrices into the tiles of AMX, and the product of packed panels. Included by cpu.cpp inside a region that
// is compiled for AMX.
//
// A tile has 16 rows of 64 bytes. Of A it holds 16 rows x 32 columns; of B, 32 rows x 16 columns with each pair of rows
// side by side: row j holds B[2j, n], B[2j + 1, n] for 16 columns n. A panel is 32 rows of A (or columns of B): for
// each step of 32 along the depth two tiles, then two more with what the first leave of float32 numbers.

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStep = 32;   // depth of a tile
constexpr int64_t kPanel = 32;  // rows or columns of a panel

// Pairs of bfloat16 numbers, the first of each in the low half.
using Pairs = __m512i;

struct Parts {
  __m512i high, low;
};

// float32 numbers as sums of two bfloat16 numbers, whose bits stand in the low halves of 32-bit lanes; a number smaller
// than `fine` has no low part. What has one is cut, not rounded, so that it cannot overflow; infinity has none.
HE_TILES_INLINE Parts parts_of(__m512 values, float fine) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i cut = _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000u));
  const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(values), _mm512_set1_ps(fine), _CMP_NLT_UQ);
  const __mmask16 differs = _mm512_mask_cmpneq_epi32_mask(large, bits, cut);
  const __m512 rest = _mm512_maskz_sub_ps(differs, values, _mm512_castsi512_ps(cut));
  const __m512i rounded = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
  return {_mm512_mask_srli_epi32(rounded, large, bits, 16),
          _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest))};
}

HE_TILES_INLINE __m512i in_pairs(__m512i first, __m512i second) {
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

HE_TILES_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

// 32 contiguous numbers as 16 pairs.
HE_TILES_INLINE Pairs pairs_along(const uint16_t* values, int64_t count) {
  const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, values);
}

HE_TILES_INLINE Parts pairs_along(const float* values, int64_t count, float fine) {
  const Parts first = parts_of(_mm512_maskz_loadu_ps(first_lanes(count), values), fine);
  const Parts second = parts_of(_mm512_maskz_loadu_ps(first_lanes(count - 16), values + 16), fine);
  const auto joined = [](__m512i left, __m512i right) __attribute__((always_inline)) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(left)), _mm512_cvtepi32_epi16(right), 1);
  };
  return {joined(first.high, second.high), joined(first.low, second.low)};
}

// The pairs of two contiguous rows of 16 numbers.
HE_TILES_INLINE Pairs pairs_across(const uint16_t* first, const uint16_t* second, int64_t count) {
  const __mmask16 mask = first_lanes(count);
  const auto load = [mask](const uint16_t* values) __attribute__((always_inline)) {
    return values ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values)) : _mm512_setzero_si512();
  };
  return in_pairs(load(first), load(second));
}

HE_TILES_INLINE Parts pairs_across(const float* first, const float* second, int64_t count, const float* fine) {
  const __mmask16 mask = first_lanes(count);
  const Parts one = parts_of(_mm512_maskz_loadu_ps(mask, first), fine[0]);
  const Parts two = second ? parts_of(_mm512_maskz_loadu_ps(mask, second), fine[1]) : Parts{};
  return {in_pairs(one.high, two.high), in_pairs(one.low, two.low)};
}

// rows[i] lane j becomes rows[j] lane i.
HE_TILES_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i half[16];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    half[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    half[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
  }
}

HE_TILES_INLINE void store_tile(char* tile, const __m512i (&rows)[16]) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 64 * i, rows[i]);
}

// Where a tile comes from: `count` rows of A or columns of B, `depth` numbers of each. A line is contiguous: one of
// those rows or columns, or what they have at one place of the depth. `fine` [lines]: see parts_of.
template <class Element>
struct TileSource {
  const Element* values;
  int64_t line_stride;
  bool along_depth;
  int64_t count;
  int64_t depth;
  const float* fine;
};

// Rows of a wide matrix lie pages apart, where the processor does not look ahead by itself. Past the end of the matrix
// a prefetch does nothing.
template <class Element>
HE_TILES_INLINE void prefetch_tile_ahead(const Element* values) {
  _mm_prefetch((const char*)values, _MM_HINT_T0);
  if (sizeof(Element) == 4) _mm_prefetch((const char*)values + 64, _MM_HINT_T0);
}

// Sixteen pairs of each of sixteen rows or columns: by row or column where the depth is contiguous, otherwise by pair.
template <class Element>
HE_TILES_INLINE void read_pairs(const TileSource<Element>& from, __m512i (&high)[16], __m512i (&low)[16]) {
  for (int64_t i = 0; i < 16; ++i) {
    high[i] = low[i] = _mm512_setzero_si512();
    if (from.along_depth) {
      if (i >= from.count) continue;
      const Element* const values = from.values + i * from.line_stride;
      prefetch_tile_ahead(values + 4 * kStep);
      if constexpr (sizeof(Element) == 2) {
        high[i] = pairs_along(values, from.depth);
      } else {
        const Parts parts = pairs_along(values, from.depth, from.fine[i]);
        high[i] = parts.high, low[i] = parts.low;
      }
    } else {
      if (2 * i >= from.depth) continue;
      const Element* const first = from.values + 2 * i * from.line_stride;
      prefetch_tile_ahead(first + kStep * from.line_stride);
      prefetch_tile_ahead(first + (kStep + 1) * from.line_stride);
      const Element* const second = 2 * i + 1 < from.depth ? first + from.line_stride : nullptr;
      if constexpr (sizeof(Element) == 2) {
        high[i] = pairs_across(first, second, from.count);
      } else {
        const Parts parts = pairs_across(first, second, from.count, from.fine + 2 * i);
        high[i] = parts.high, low[i] = parts.low;
      }
    }
  }
}

// Returns whether a number has a low part; without any, the low tile is not written.
template <class Element>
static bool pack_tile(const TileSource<Element>& from, bool by_pair, char* high_tile, char* low_tile) {
  __m512i high[16], low[16];
  read_pairs(from, high, low);
  const bool turned = from.along_depth == by_pair;
  if (turned) transpose(high);
  store_tile(high_tile, high);
  if constexpr (sizeof(Element) == 2) return false;
  __m512i any = low[0];
  for (int i = 1; i < 16; ++i) any = _mm512_or_si512(any, low[i]);
  const bool has_low = _mm512_test_epi32_mask(any, any) != 0;
  if (has_low) {
    if (turned) transpose(low);
    store_tile(low_tile, low);
  }
  return has_low;
}

static void round_to(uint16_t* to, const float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(count - i);
    const __m512 wide = _mm512_maskz_loadu_ps(mask, values + i);
    _mm256_mask_storeu_epi16(to + i, mask, (__m256i)_mm512_cvtneps_pbh(wide));
  }
}

// The largest magnitude; NaN counts as nothing.
static float largest_of(const float* values, int64_t count) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    // The second operand is taken where one is NaN.
    largest = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), values + i)), largest);
  }
  return _mm512_reduce_max_ps(largest);
}

struct TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void configure_tiles() {
  const TileConfiguration configuration;
  // Not the intrinsic: GCC's tells the compiler of the first 8 bytes alone, and the rest may not be written yet.
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}

static void release_tiles() { _tile_release(); }

// c [32, 32] (+)= a panel of A times a panel of B. Tiles 0 to 3 hold the sums. `low`: which of A's four tiles of a step
// are low parts that count, as bits; null where A has none.
template <bool kTwoParts>
static void multiply_panels(const char* a, const uint8_t* low, const char* b, int64_t steps, float* c, int64_t c_bytes,
                            bool accumulate) {
  asm volatile("" ::: "memory");  // GCC's intrinsics do not say that they read memory
  float* const lower = (float*)((char*)c + kTileRows * c_bytes);
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, lower, c_bytes);
    _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    if (kTwoParts && (low[step] & 1)) {
      _tile_loadd(4, a + 2 * kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoParts && (low[step] & 2)) {
      _tile_loadd(5, a + 3 * kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += (kTwoParts ? 4 : 2) * kTileBytes;
    b += 2 * kTileBytes;
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, lower, c_bytes);
  _tile_stored(3, lower + 16, c_bytes);
  asm volatile("" ::: "memory");
}
