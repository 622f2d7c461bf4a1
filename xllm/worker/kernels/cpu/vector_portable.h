// Sixteen floats in plain C++: what every compiler turns into something sensible. The three vector
// headers have one interface; a file of kernels is compiled once with each.

constexpr int kMaxQueries = 4;     // that one pass over keys or values serves
constexpr int kAccumulators = 4;  // vectors that stay in registers

struct Vec {
  float lane[16];
};

inline Vec set1(float x) {
  Vec v;
  for (float& lane : v.lane) lane = x;
  return v;
}
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(v.lane, p, sizeof v.lane);
  return v;
}
inline Vec load(const Bf16* p) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = to_float(p[i]);
  return v;
}
inline Vec load(const int8_t* p) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = static_cast<float>(p[i]);
  return v;
}
// The first n lanes; the others are 0 and their memory is not touched.
template <class T>
inline Vec load_part(const T* p, int n) {
  T part[16] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
inline void store(float* p, const Vec& v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline void store(Bf16* p, const Vec& v) {
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(v.lane[i]);
}
inline void store_part(float* p, const Vec& v, int n) { std::memcpy(p, v.lane, n * sizeof(float)); }

// max and min give b where one of both is a NaN.
#define XK_LANES(name, expression)                                 \
  inline Vec name(const Vec& a, const Vec& b) {                    \
    Vec v;                                                         \
    for (int i = 0; i < 16; ++i) v.lane[i] = (expression);         \
    return v;                                                      \
  }
XK_LANES(add, a.lane[i] + b.lane[i])
XK_LANES(sub, a.lane[i] - b.lane[i])
XK_LANES(mul, a.lane[i] * b.lane[i])
XK_LANES(div, a.lane[i] / b.lane[i])
XK_LANES(max, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
XK_LANES(min, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
#undef XK_LANES

inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return v;
}

// c + a b, for sums of many.
inline Vec accumulate(const Vec& c, const Vec& a, const Vec& b) { return fma(a, b, c); }

// Lanes [low, high) of a, the others of b.
inline Vec keep(const Vec& a, int low, int high, const Vec& b) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = i >= low && i < high ? a.lane[i] : b.lane[i];
  return v;
}

// 0 where x < limit, else a; a NaN of x is not below.
inline Vec zero_below(const Vec& a, const Vec& x, const Vec& limit) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = x.lane[i] < limit.lane[i] ? 0.0f : a.lane[i];
  return v;
}

// x * 2^n for whole n in -126..127 whose results are normal numbers.
inline Vec scale_by_power(const Vec& x, const Vec& n) {
  Vec v;
  for (int i = 0; i < 16; ++i) {
    const float whole = n.lane[i] == n.lane[i] ? n.lane[i] : 0.0f;
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    v.lane[i] = x.lane[i] * power;
  }
  return v;
}
// To the nearest whole number, for |x| < 2^22.
inline Vec round_whole(const Vec& x) {
  const Vec magic = set1(12582912.0f);
  return sub(add(x, magic), magic);
}

inline float sum_lanes(const Vec& v) {
  float part[8];
  for (int i = 0; i < 8; ++i) part[i] = v.lane[i] + v.lane[i + 8];
  for (int width = 4; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}
inline float max_lanes(const Vec& v) {
  float best = v.lane[0];
  for (float lane : v.lane) best = lane > best ? lane : best;
  return best;
}
