// Sums of AVX-512 registers, and its floats.
#pragma once

#include <immintrin.h>

#include "prompt.h"

namespace scheinfer {
namespace {

inline __m128 add_lanes(__m512 v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), high);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int R>
inline void add_up(const __m512* sum, float* out) {
  const __m512 none = _mm512_setzero_ps();
  const __m512 a = sum[0], b = R > 1 ? sum[1 % R] : none, c = R > 2 ? sum[2 % R] : none, d = R > 3 ? sum[3 % R] : none;
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  float four[4];
  _mm_storeu_ps(four, add_lanes(_mm512_add_ps(low, high)));
  memcpy(out, four, R * sizeof(float));
}

inline __mmask16 first16_of(int64_t n) { return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); }

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m512 load16(const F16bits* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <class Element>
struct Avx512 {
  using Weight = Element;
  using Input = float;
  using Widened = Avx512<float>;
  using W = __m512;
  using X = __m512;
  using Sum = __m512;
  static constexpr int STEP = 16, TOKENS = 6;
  static constexpr int64_t BLOCK = 1024;
  static Sum zero() { return _mm512_setzero_ps(); }
  static W load_weights(const Weight* p) { return load16(p); }
  static X load_input(const Input* p) { return _mm512_loadu_ps(p); }
  static Sum add(Sum sum, W w, X x) { return _mm512_fmadd_ps(w, x, sum); }
  static X broadcast(const Input* p) { return _mm512_set1_ps(*p); }
  static __m512i dwords(const Weight* p) { return _mm512_castps_si512(load16(p)); }
  static __m512i columns(const Weight* row) { return dwords(row); }
  static void store16(__m512 v, Input* to) { _mm512_storeu_ps(to, v); }
  static void widen_row(const Weight* from, int64_t n, float* to) {
    for (int64_t k = 0; k < n; k++) to[k] = widen(from[k]);
  }
  template <int R>
  static void totals(const Sum* sum, float* out) {
    add_up<R>(sum, out);
  }
};

}  // namespace
}  // namespace scheinfer
