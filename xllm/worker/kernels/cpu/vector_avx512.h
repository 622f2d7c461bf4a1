// Sixteen floats as one AVX-512 register; see vector_portable.h.

constexpr int kMaxQueries = 8;
constexpr int kAccumulators = 24;

struct Vec {
  __m512 all;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec widen(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load_part(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load_part(const Bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vec load_part(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}
inline void store(float* p, const Vec& v) { _mm512_storeu_ps(p, v.all); }
inline void store(Bf16* p, const Vec& v) {
  const __m512i bits = _mm512_castps_si512(v.all);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v.all, v.all, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}
inline void store_part(float* p, const Vec& v, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v.all);
}

inline Vec add(const Vec& a, const Vec& b) { return {_mm512_add_ps(a.all, b.all)}; }
inline Vec sub(const Vec& a, const Vec& b) { return {_mm512_sub_ps(a.all, b.all)}; }
inline Vec mul(const Vec& a, const Vec& b) { return {_mm512_mul_ps(a.all, b.all)}; }
inline Vec div(const Vec& a, const Vec& b) { return {_mm512_div_ps(a.all, b.all)}; }
inline Vec max(const Vec& a, const Vec& b) { return {_mm512_max_ps(a.all, b.all)}; }
inline Vec min(const Vec& a, const Vec& b) { return {_mm512_min_ps(a.all, b.all)}; }
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return {_mm512_fmadd_ps(a.all, b.all, c.all)};
}
// c + a b: as assembly, or GCC copies a block of sums among registers and spills them.
inline Vec accumulate(const Vec& c, const Vec& a, const Vec& b) {
  __m512 sum = c.all;
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a.all), "v"(b.all));
  return {sum};
}
inline Vec keep(const Vec& a, int low, int high, const Vec& b) {
  const __mmask16 kept = static_cast<__mmask16>(((1u << high) - 1u) & ~((1u << low) - 1u));
  return {_mm512_mask_mov_ps(b.all, kept, a.all)};
}
inline Vec zero_below(const Vec& a, const Vec& x, const Vec& limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.all, limit.all, _CMP_NLT_UQ), a.all)};
}
inline Vec scale_by_power(const Vec& x, const Vec& n) { return {_mm512_scalef_ps(x.all, n.all)}; }
inline Vec round_whole(const Vec& x) {
  return {_mm512_roundscale_ps(x.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline float sum_lanes(const Vec& v) {
  const __m256 upper = _mm512_extractf32x8_ps(v.all, 1);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.all), upper);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float max_lanes(const Vec& v) {
  const __m256 upper = _mm512_extractf32x8_ps(v.all, 1);
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v.all), upper);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
