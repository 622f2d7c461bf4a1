// What is built from the lanes of any variant; included behind one of the vector headers.

inline Vec load_up_to(const float* p, int n) { return n >= 16 ? load(p) : load_part(p, n); }
inline void store_up_to(float* p, const Vec& v, int n) {
  if (n >= 16)
    store(p, v);
  else
    store_part(p, v, n);
}

// e^x for x <= 88: range reduction by ln 2 in two parts, a polynomial of degree 6 (Cephes), error
// below 2 ulp. Exactly 1 at 0; exactly 0 below -87, -infinity included; a NaN stays one.
inline Vec exponential(const Vec& x) {
  const Vec lowest = set1(-87.0f);
  const Vec clamped = min(set1(88.0f), max(lowest, x));
  const Vec n = round_whole(mul(clamped, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return zero_below(scale_by_power(p, n), x, lowest);
}

// tanh(x), for soft caps.
inline Vec hyperbolic_tangent(const Vec& x) {
  const Vec one = set1(1.0f);
  const Vec power = exponential(min(set1(40.0f), add(x, x)));
  return div(sub(power, one), add(power, one));
}
