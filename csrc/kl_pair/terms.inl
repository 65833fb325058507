// The divergence of two rows of logits, a vector at a time. Included once per instruction set by cpu.cpp.
//
// With x = a/T, y = b/T and the maxima A, B of the row's logits, E = exp((a - A)/T) and F = exp((b - B)/T) have the
// sums S_a and S_b; p = E/S_a, q = F/S_b, and u = log p - log q = (a - b)/T - c with c = lse(x) - lse(y). One
// exponential per logit: E and F are kept until the sums are known.
//
// Accuracy where a and b are nearly equal, so that |u| ~ d << 1 and the divergence is d^2/2. Summing p u itself would
// have the error eps d. Instead, with h(u) = exp(-u) - 1 + u >= 0 from its Taylor series for |u| < 1,
//     q - p          = p (h - u)
//     KL(p || q)     = sum p u + (q - p) = sum p h           (sum q - p is 0)
//     (KL + KL')/2   = sum (p - q) u / 2
// are sums of terms without cancellation, none negative. An error e of c would cost them e^2/2 only, but the gradients
// e, so c comes from such differences too: with s = (A - B)/T and v = ((a - b) - (A - B))/T,
//     u = v + r,     r = s - c = log1p(sum E (exp(-v) - 1) / S_a)
// where A - B may be any number, thus also the rounded one, and r has an error of order eps d. What is left are the
// roundings of a - b (none where b is within a factor 2 of a), of v (none in the difference where A - B is within a
// factor 2 of a - b) and of u: the relative error of the divergence is a few eps, and an entry of the gradients is off
// by a few eps of the largest one and of p_j max |v|. Equal logits give v = r = u = 0 and with them zeros throughout.
//
// Where they are not equal, the gradients p (u - KL) and q (-u - KL') lose to cancellation if one class has nearly all
// of p or q. They are formed as p (v - mean of v under p) from the same v, which is about 0 at that class.

// (-1)^k / (k + 2)!: the series of h(u)/u^2. 9 terms leave 3e-8 of it at |u| = 1, 18 terms 3e-18.
constexpr double kExcess[] = {1.0 / 2,
                              -1.0 / 6,
                              1.0 / 24,
                              -1.0 / 120,
                              1.0 / 720,
                              -1.0 / 5040,
                              1.0 / 40320,
                              -1.0 / 362880,
                              1.0 / 3628800,
                              -1.0 / 39916800,
                              1.0 / 479001600,
                              -1.0 / 6227020800,
                              1.0 / 87178291200,
                              -1.0 / 1307674368000,
                              1.0 / 20922789888000,
                              -1.0 / 355687428096000,
                              1.0 / 6402373705728000,
                              -1.0 / 121645100408832000};

HE_INLINE FloatLanes excess(FloatLanes u) {
  FloatLanes h = splat<FloatLanes>((float)kExcess[8]);
#pragma GCC unroll 8
  for (int k = 7; k >= 0; --k) h = h * u + (float)kExcess[k];
  return h * u * u;
}
HE_INLINE DoubleLanes excess(DoubleLanes u) {
  DoubleLanes h = splat<DoubleLanes>(kExcess[17]);
#pragma GCC unroll 17
  for (int k = 16; k >= 0; --k) h = h * u + kExcess[k];
  return h * u * u;
}

// A quarter of the largest number: differences beyond count as infinite, and a sum of two does not overflow.
HE_INLINE FloatLanes largest(FloatLanes) { return splat<FloatLanes>(0.25f * __FLT_MAX__); }
HE_INLINE DoubleLanes largest(DoubleLanes) { return splat<DoubleLanes>(0.25 * __DBL_MAX__); }

// Into the finite numbers, so that a probability of 0 makes 0 of it; NaN becomes the lowest. NaN is only met where both
// logits are -inf, or in a row whose sums are NaN.
template <class Vector>
HE_INLINE Vector bounded(Vector x) {
  const Vector top = largest(x);
  const Vector raised = x > -top ? x : -top;
  return raised < top ? raised : top;
}

template <class Vector>
HE_INLINE auto is_small(Vector u) {
  return (u < splat<Vector>(1.0f)) & (u > splat<Vector>(-1.0f));
}

template <class Vector>
HE_INLINE Vector smaller(Vector candidate, Vector best) {
  return candidate < best ? candidate : best;
}

// What is subtracted from the logits of a row. `Value` is a number, or a vector of the numbers of several rows.
template <class Value, class Scalar>
struct Level {
  Value first_maximum;
  Value second_maximum;
  Value shift;  // A - B
  Scalar inverse_temperature;
};

template <class Vector>
struct Moments {
  Vector first;         // sum E
  Vector second;        // sum F
  Vector change;        // sum E (exp(-v) - 1)
  Vector first_moved;   // sum E v
  Vector second_moved;  // sum F v
  Vector highest;       // v; above `largest` where b excludes what a does not
  Vector lowest;
};
template <class Vector>
HE_INLINE Moments<Vector> no_moments() {
  const Vector zero{};
  return {zero, zero, zero, zero, zero, splat<Vector>(-__builtin_inff()), splat<Vector>(__builtin_inff())};
}

// v, before it is bounded. Subtracted first, then scaled: (a - b)/T - s, contracted to one instruction, would leave the
// rounding error of s, 1e23 at 1e30, where a - b = A - B must give 0.
template <class Vector, class Value, class Scalar>
HE_INLINE Vector moved(Vector a, Vector b, const Level<Value, Scalar>& level) {
  return ((a - b) - level.shift) * level.inverse_temperature;
}

// Adds to the moments and returns E and F. Without kSymmetric what only KL(q || p) needs is left out.
template <bool kSymmetric, class Vector, class Value, class Scalar>
HE_INLINE void exponentiate(Vector a, Vector b, const Level<Value, Scalar>& level, Moments<Vector>& sums, Vector& e,
                            Vector& f) {
  e = exp_of_nonpositive((Vector)((a - level.first_maximum) * level.inverse_temperature));
  f = exp_of_nonpositive((Vector)((b - level.second_maximum) * level.inverse_temperature));
  const Vector difference = moved(a, b, level);
  const Vector v = bounded(difference);
  sums.first += e;
  sums.second += f;
  sums.change += is_small(v) ? e * (excess(v) - v) : f - e;
  sums.first_moved += e * v;
  sums.highest = larger(difference, sums.highest);
  if constexpr (kSymmetric) {
    sums.second_moved += f * v;
    sums.lowest = smaller(difference, sums.lowest);
  }
}

// The moments of a row, summed up.
struct RowSums {
  double first = 0;
  double second = 0;
  double change = 0;
  double first_moved = 0;
  double second_moved = 0;
  bool first_only = false;   // KL(p || q) is infinite
  bool second_only = false;  // KL(q || p) is infinite
};

// What the last pass multiplies and adds; Value as in Level.
template <class Value>
struct Finish {
  Value first_factor;   // 1 / S_a
  Value second_factor;  // 1 / S_b
  Value rest;           // r
  Value first_mean;     // of v under p; NaN where KL(p || q) is infinite or NaN
  Value second_mean;    // of v under q
};

HE_INLINE Finish<double> finish_of(const RowSums& sums) {
  const double grown = sums.change / sums.first;
  // Far from 0 the sum of the differences would itself be a difference.
  const bool near = grown < 0.5 && grown > -0.5;
  const double rest = near ? __builtin_log1p(grown) : __builtin_log(sums.second / sums.first);
  const double first = 1.0 / sums.first, second = 1.0 / sums.second, nan = __builtin_nan("");
  // NaN on one side only spoils the other side's gradient through its mean: v is bounded.
  const bool unknown = rest != rest;
  return {first, second, rest, sums.first_only || unknown ? nan : sums.first_moved * first,
          sums.second_only || unknown ? nan : sums.second_moved * second};
}

// Adds to the sum of the divergence's terms (-2 of them if symmetric) and returns T times the gradients, twice if
// symmetric.
template <bool kSymmetric, class Vector, class Value, class Scalar>
HE_INLINE void finish(Vector a, Vector b, Vector e, Vector f, const Level<Value, Scalar>& level,
                      const Finish<Value>& by, Vector& total, Vector& first_gradient, Vector& second_gradient) {
  const Vector v = bounded(moved(a, b, level));
  const Vector p = e * by.first_factor, q = f * by.second_factor, u = v + by.rest;
  const auto small = is_small(u);
  const Vector ph = p * excess(u), pu = p * u;
  const Vector change = small ? ph - pu : q - p;
  total += kSymmetric ? change * u : small ? ph : pu + change;
  first_gradient = p * (v - by.first_mean);
  second_gradient = change;
  if constexpr (kSymmetric) {
    first_gradient -= change;
    second_gradient -= q * (v - by.second_mean);
  }
}

// The divergence from the sum that `finish` made.
template <bool kSymmetric>
HE_INLINE double divergence_of(double total, const RowSums& sums) {
  const double value = kSymmetric ? -0.5 * total : total;
  return (sums.first_only || sums.second_only) && value == value ? __builtin_inf() : value;
}
