// Dropout of a range of blocks. Included once per instruction set by cpu.cpp.
//
// Threefry-2x32-20 (Salmon et al. 2011) is a counter-based generator of additions, rotations and exclusive ors alone:
// it needs no wide multiplication, which SSE2 and AVX2 lack, and vectorises everywhere. A block of 64 elements takes
// 16 counters of two words each; of each word the low half decides about an element, the high half about another.

HE_INLINE BitLanes rotated(BitLanes x, int bits) { return (x << bits) | (x >> (32 - bits)); }

HE_INLINE void threefry(const uint32_t (&key)[3], BitLanes& x0, BitLanes& x1) {
  constexpr int kRotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  x0 += key[0];
  x1 += key[1];
#pragma GCC unroll 20
  for (int round = 0; round < 20; ++round) {
    x0 += x1;
    x1 = rotated(x1, kRotations[round % 8]) ^ x0;
    if (round % 4 == 3) {
      const uint32_t injection = round / 4 + 1;
      x0 += key[injection % 3];
      x1 += key[(injection + 1) % 3] + injection;
    }
  }
}

constexpr int kBlock = 64;

// The 16-bit random numbers of a block: low halves of the first words, of the second words, then the high halves.
HE_INLINE void draw(const uint32_t (&key)[3], int64_t block, uint32_t (&numbers)[kBlock]) {
  const uint64_t first = (uint64_t)block * 16;
  BitLanes lane;
  for (int i = 0; i < kFloatLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int start = 0; start < 16; start += kFloatLanes) {
    BitLanes x0 = lane + ((uint32_t)first + start), x1 = splat<BitLanes>((uint32_t)(first >> 32));
    threefry(key, x0, x1);
    const BitLanes halves[4] = {x0 & 0xffffu, x1 & 0xffffu, x0 >> 16, x1 >> 16};
    for (int part = 0; part < 4; ++part) __builtin_memcpy(numbers + 16 * part + start, &halves[part], sizeof(x0));
  }
}

HE_INLINE FloatLanes kept(const uint32_t* numbers, uint32_t threshold, FloatLanes value) {
  return load_as<BitLanes>(numbers) >= threshold ? value : FloatLanes{};
}
HE_INLINE DoubleLanes kept(const uint32_t* numbers, uint32_t threshold, DoubleLanes value) {
  for (int lane = 0; lane < kDoubleLanes; ++lane) value[lane] = numbers[lane] >= threshold ? value[lane] : 0.0;
  return value;
}

template <class Element>
static void drop_blocks(const Dropout& work, int64_t begin, int64_t end) {
  const uint32_t low = (uint32_t)work.seed, high = (uint32_t)(work.seed >> 32);
  const uint32_t key[3] = {low, high, 0x1BD11BDAu ^ low ^ high};
  const auto scale = (Accumulator<Element>)work.scale;
  const Element* input = (const Element*)work.input;
  Element* output = (Element*)work.output;
  uint32_t numbers[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    draw(key, block, numbers);
    const int64_t start = block * kBlock, count = work.count - start < kBlock ? work.count - start : kBlock;
    if (count == kBlock) {
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; i += Lanes<Element>::count) {
        store(output + start + i, kept(numbers + i, work.threshold, load(input + start + i) * scale));
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const auto value = to_accumulator(input[start + i]) * scale;
        store_one(output + start + i, numbers[i] >= work.threshold ? value : 0);
      }
    }
  }
}

static void run_blocks(const Dropout& work, int64_t begin, int64_t end) {
  switch (work.element) {
    case ElementType::float32:
      drop_blocks<float>(work, begin, end);
      break;
    case ElementType::bfloat16:
      drop_blocks<Bf16>(work, begin, end);
      break;
    case ElementType::float64:
      drop_blocks<double>(work, begin, end);
      break;
  }
}
