// The positions of a sequence, over all sites, in the one order in which every sum runs: masked ones are skipped, so a
// sequence gives the same bits alone, in any batch and under any padding.

template <class Element>
struct Position {
  const Element* delta;
  const Element* gradient;
  Element* output;
  int64_t width;
  bool kept;
};

template <class Element, class Visit>
HE_INLINE void for_each_position(const PerturbStep& step, int64_t sequence, Visit visit) {
  for (const PerturbSite& site : step.sites) {
    for (int64_t index = 0; index < site.length; ++index) {
      const int64_t place = sequence * site.length + index;
      const int64_t offset = place * site.width;
      visit(Position<Element>{(const Element*)site.delta + offset, (const Element*)site.gradient + offset,
                              (Element*)site.output + offset, site.width, site.mask[place]});
    }
  }
}

// Of vectors and of scalars.
template <class Value, class Scalar>
HE_INLINE Value sign_step(Value g, Scalar size) {
  const Value up = splat<Value>(size);
  return g > 0 ? up : (g < 0 ? -up : Value{});
}
template <class Value, class Scalar>
HE_INLINE Value clamp(Value z, Scalar limit) {
  const Value up = splat<Value>(limit);
  return z > up ? up : (z < -up ? -up : z);
}
