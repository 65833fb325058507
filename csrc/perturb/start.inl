// The random start of each sequence. The operations are the reference's, in its order: so are the bits, except where
// torch's vectors round a square root wrongly (MKL's do in float64).

HE_INLINE double square_root(double x) { return __builtin_sqrt(x); }
HE_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

template <class Element>
static void start_sequence(const PerturbStart& start, int64_t sequence) {
  using Number = Accumulator<Element>;
  int64_t count = 0;
  for (const StartSite& site : start.sites) {
    for (int64_t i = 0; i < site.length; ++i) count += site.mask[sequence * site.length + i] ? site.width : 0;
  }
  const Number reciprocal = (Number)1 / square_root((Number)(count > 1 ? count : 1));
  const Number scale = start.linf ? (Number)start.epsilon : (Number)start.epsilon * reciprocal;
  for (const StartSite& site : start.sites) {
    for (int64_t index = 0; index < site.length; ++index) {
      const int64_t place = sequence * site.length + index;
      const Element* const uniform = (const Element*)site.uniform + place * site.width;
      Element* const output = (Element*)site.output + place * site.width;
      if (!site.mask[place]) {
        __builtin_memset((void*)output, 0, site.width * sizeof(Element));
        continue;
      }
      int64_t i = 0;
      // 2 u is exact, so that fusing it with the subtraction changes nothing.
      for (; i + Lanes<Element>::count <= site.width; i += Lanes<Element>::count) {
        store(output + i, (load(uniform + i) * 2 - 1) * scale);
      }
      for (; i < site.width; ++i) store_one(output + i, (to_accumulator(uniform[i]) * 2 - 1) * scale);
    }
  }
}

static void start_sequences(const PerturbStart& start, int64_t begin, int64_t end) {
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    switch (start.element) {
      case ElementType::float32:
        start_sequence<float>(start, sequence);
        break;
      case ElementType::bfloat16:
        start_sequence<Bf16>(start, sequence);
        break;
      case ElementType::float64:
        start_sequence<double>(start, sequence);
        break;
    }
  }
}
