// What multiplies by tiles shares: their shapes, operands packed for them, what comes out of them by rows.
#pragma once

#include "avx512.h"

namespace scheinfer {
namespace {

constexpr int64_t STEP = 32, LINE = 64, TILE_BYTES = 1024, HALF = STRIP_ROWS / 2;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

alignas(64) constexpr TileShapes shapes;

inline void written() { asm volatile("" ::: "memory"); }  // tile loads do not tell the compiler what they read

inline __mmask32 first_of(int64_t n) { return n >= 32 ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : 0; }

// N tiles of sums, as zeros or from where they lie.
template <int N>
inline void begin_sums(const float* sums, bool zeros) {
  static_assert(N == 2 || N == 4, "tiles are named by constants");
  if (zeros) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (N == 4) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  _tile_loadd(0, sums, LINE);
  _tile_loadd(1, sums + 256, LINE);
  if constexpr (N == 4) {
    _tile_loadd(2, sums + 512, LINE);
    _tile_loadd(3, sums + 768, LINE);
  }
}

template <int N>
inline void store_sums(float* sums) {
  _tile_stored(0, sums, LINE);
  _tile_stored(1, sums + 256, LINE);
  if constexpr (N == 4) {
    _tile_stored(2, sums + 512, LINE);
    _tile_stored(3, sums + 768, LINE);
  }
}

void pack(const void* const* rows, int64_t n_rows, int64_t K, int64_t block, int64_t n_blocks, void* x) {
  for (int64_t k = 0; k < K; k += STEP) {
    char* to = static_cast<char*>(x) + packed_at(k, K, block, n_blocks);
    __m512i v[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++)
      v[i] = i < n_rows ? _mm512_maskz_loadu_epi16(first_of(K - k), static_cast<const Bf16*>(rows[i]) + k)
                        : _mm512_setzero_si512();
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * LINE, v[i]);
  }
}

// Two rows of 16 floats as 16 pairs of bfloat16.
inline __m512i pairs_of(__m512 one, __m512 other) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(other, one));
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

// 16 rows of a strip from one on, by token.
inline void by_token(const float* sums, int64_t row, __m512i (&v)[SIDE]) {
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; i++) v[i] = _mm512_load_si512(sums + (row + i) * SIDE);
  transpose(v);
}

}  // namespace
}  // namespace scheinfer
