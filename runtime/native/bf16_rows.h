// Norms, sums and rotations of rows of bfloat16, sixteen numbers at once and rounded by the CPU. Numbers below the smallest
// normal one count as zero there.
#pragma once

#include "avx512.h"

namespace scheinfer {
namespace {

inline __m512 wide(__m256i raw) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m512 wide16(const Bf16* from, __mmask16 some) { return wide(_mm256_maskz_loadu_epi16(some, from)); }
inline __m256i narrow16(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
inline __m512 rounded16(__m512 v) { return wide(narrow16(v)); }

// As norm_row of step.h.
void norm_bf16_row(const void* from, const void* weight, int64_t n, float eps, void* to) {
  const auto *x = static_cast<const Bf16*>(from), *w = static_cast<const Bf16*>(weight);
  auto* y = static_cast<Bf16*>(to);
  __m512 sums[4] = {};
  for (int64_t i = 0; i < n; i += 64)
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; j++) {
      const int64_t at = i + 16 * j;
      if (at >= n) break;
      const __m512 v = wide16(x + at, first16_of(n - at));
      sums[j] = _mm512_fmadd_ps(v, v, sums[j]);
    }
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / float(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = first16_of(n - i);
    const __m512 v = rounded16(_mm512_mul_ps(wide16(x + i, some), scale));
    _mm256_mask_storeu_epi16(y + i, some, narrow16(_mm512_mul_ps(wide16(w + i, some), v)));
  }
}

void add_bf16_row(const void* one, const void* other, int64_t n, void* to) {
  const auto *a = static_cast<const Bf16*>(one), *b = static_cast<const Bf16*>(other);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = first16_of(n - i);
    const __m512 sum = _mm512_add_ps(wide16(a + i, some), wide16(b + i, some));
    _mm256_mask_storeu_epi16(static_cast<Bf16*>(to) + i, some, narrow16(sum));
  }
}

// As turn_row of step.h.
void turn_bf16_row(void* values, const void* cosine, const void* sine, int64_t n) {
  auto* x = static_cast<Bf16*>(values);
  const auto *c = static_cast<const Bf16*>(cosine), *s = static_cast<const Bf16*>(sine);
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 some = first16_of(half - i);
    const auto of = [=](const Bf16* from) { return wide16(from, some); };
    const auto product = [](__m512 p, __m512 q) { return rounded16(_mm512_mul_ps(p, q)); };
    const __m512 a = of(x + i), b = of(x + half + i);
    const __m512 one = _mm512_sub_ps(product(a, of(c + i)), product(b, of(s + i)));
    const __m512 other = _mm512_add_ps(product(b, of(c + half + i)), product(a, of(s + half + i)));
    _mm256_mask_storeu_epi16(x + i, some, narrow16(one));
    _mm256_mask_storeu_epi16(x + half + i, some, narrow16(other));
  }
}

}  // namespace
}  // namespace scheinfer
