// AVX2 with FMA and F16C: eight floats.
#include <immintrin.h>

#include "step.h"

namespace scheinfer {
namespace {

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline __m256 load8(const F16bits* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

template <class Element>
struct Avx2 {
  using Weight = Element;
  using Input = float;
  using Widened = Avx2<float>;
  using W = __m256;
  using X = __m256;
  using Sum = __m256;
  static constexpr int STEP = 8, TOKENS = 2;
  static constexpr int64_t BLOCK = 1024;
  static Sum zero() { return _mm256_setzero_ps(); }
  static W load_weights(const Weight* p) { return load8(p); }
  static X load_input(const Input* p) { return _mm256_loadu_ps(p); }
  static Sum add(Sum sum, W w, X x) { return _mm256_fmadd_ps(w, x, sum); }
  static void widen_row(const Weight* from, int64_t n, float* to) {
    for (int64_t k = 0; k < n; k++) to[k] = widen(from[k]);
  }
  template <int R>
  static void totals(const Sum* sum, float* out) {
    for (int r = 0; r < R; r++) {
      __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum[r]), _mm256_extractf128_ps(sum[r], 1));
      four = _mm_add_ps(four, _mm_movehl_ps(four, four));
      out[r] = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
  }
};

}  // namespace

const Kernels* avx2_kernels(int dtype) {
  if (dtype == BF16) return kernels_of<Avx2<Bf16>>();
  if (dtype == F16) return kernels_of<Avx2<F16bits>>();
  return kernels_of<Avx2<float>>();
}

}  // namespace scheinfer
