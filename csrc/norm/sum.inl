// The sum of squares of one chunk. Included once per instruction set by cpu.cpp.

template <class Element>
static double sum_of_squares(const Element* values, int64_t count) {
  DoubleLanes sums[4] = {DoubleLanes{}, DoubleLanes{}, DoubleLanes{}, DoubleLanes{}};
  int64_t i = 0;
  for (; i + 4 * kDoubleLanes <= count; i += 4 * kDoubleLanes) {
    for (int part = 0; part < 4; ++part) {
      const DoubleLanes value = load_wide(values + i + part * kDoubleLanes);
      sums[part] += value * value;
    }
  }
  double sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) sum += (double)to_accumulator(values[i]) * (double)to_accumulator(values[i]);
  return sum;
}

static double sum_chunk(const NormPart& chunk) {
  switch (chunk.element) {
    case ElementType::float32:
      return sum_of_squares((const float*)chunk.values, chunk.count);
    case ElementType::bfloat16:
      return sum_of_squares((const Bf16*)chunk.values, chunk.count);
    case ElementType::float64:
      return sum_of_squares((const double*)chunk.values, chunk.count);
  }
  return 0;
}

static void sum_chunks(const NormPart* chunks, double* sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) sums[i] = sum_chunk(chunks[i]);
}
