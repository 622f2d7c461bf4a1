// Sixteen floats as two AVX registers; see vector_portable.h.

constexpr int kMaxQueries = 4;
constexpr int kAccumulators = 4;

struct Vec {
  __m256 low, high;
};

inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Bf16* p) {
  const auto* words = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(words)), widen(_mm_loadu_si128(words + 1))};
}
inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
template <class T>
inline Vec load_part(const T* p, int n) {
  T part[16] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
inline void store(float* p, const Vec& v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
inline void store(Bf16* p, const Vec& v) {
  float lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(lanes[i]);
}
inline void store_part(float* p, const Vec& v, int n) {
  float lanes[16];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(float));
}

#define XK_HALVES(name, intrinsic)                                     \
  inline Vec name(const Vec& a, const Vec& b) {                        \
    return {intrinsic(a.low, b.low), intrinsic(a.high, b.high)};       \
  }
XK_HALVES(add, _mm256_add_ps)
XK_HALVES(sub, _mm256_sub_ps)
XK_HALVES(mul, _mm256_mul_ps)
XK_HALVES(div, _mm256_div_ps)
XK_HALVES(max, _mm256_max_ps)
XK_HALVES(min, _mm256_min_ps)
#undef XK_HALVES

inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline __m256 lanes_between(int low, int high, int first) {
  const __m256i lane =
      _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(low - 1)),
                                              _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane)));
}
inline Vec accumulate(const Vec& c, const Vec& a, const Vec& b) { return fma(a, b, c); }
inline Vec keep(const Vec& a, int low, int high, const Vec& b) {
  return {_mm256_blendv_ps(b.low, a.low, lanes_between(low, high, 0)),
          _mm256_blendv_ps(b.high, a.high, lanes_between(low, high, 8))};
}
inline Vec zero_below(const Vec& a, const Vec& x, const Vec& limit) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.low, limit.low, _CMP_LT_OQ), a.low),
          _mm256_andnot_ps(_mm256_cmp_ps(x.high, limit.high, _CMP_LT_OQ), a.high)};
}
inline __m256 power_of_two(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Vec scale_by_power(const Vec& x, const Vec& n) {
  return {_mm256_mul_ps(x.low, power_of_two(n.low)), _mm256_mul_ps(x.high, power_of_two(n.high))};
}
inline Vec round_whole(const Vec& x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
inline float sum_lanes(const Vec& v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float max_lanes(const Vec& v) {
  const __m256 eight = _mm256_max_ps(v.low, v.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
