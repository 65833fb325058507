// The update of one chunk. Included once per instruction set by cpu.cpp.
//
// As torch's lerp: from the end that is nearer, so that rate 1 gives the weight to the bit.

template <class Number, class Weight>
static void update_chunk(const Average& chunk, double rate) {
  Number* const average = (Number*)chunk.average;
  const Weight* const weight = (const Weight*)chunk.weight;
  const bool near = rate < 0.5;
  const Number factor = near ? (Number)rate : (Number)1 - (Number)rate;
  const auto updated = [near, factor](auto a, auto w) { return near ? a + (w - a) * factor : w - (w - a) * factor; };
  int64_t i = 0;
  for (; i + Lanes<Number>::count <= chunk.count; i += Lanes<Number>::count) {
    store(average + i, updated(load(average + i), load(weight + i)));
  }
  for (; i < chunk.count; ++i) average[i] = updated(average[i], to_accumulator(weight[i]));
}

static void update_chunks(const Average* chunks, double rate, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (chunks[i].element == ElementType::float64) {
      update_chunk<double, double>(chunks[i], rate);
    } else if (chunks[i].weight_element == ElementType::bfloat16) {
      update_chunk<float, Bf16>(chunks[i], rate);
    } else {
      update_chunk<float, float>(chunks[i], rate);
    }
  }
}
