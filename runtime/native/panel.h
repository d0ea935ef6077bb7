// Many tokens: rows of W side by side in a vector, a token's pair broadcast, so that no sum crosses lanes.
//
// 48 rows are transposed by pairs into a panel that stays in the second cache and is used for all tokens. A tile needs
// one line of a token's activations in 16 steps, so little that what siblings leave of the first cache is enough. Sums
// run through K pair after pair whatever the threads and other tokens, but not in the order of tile.h.
#pragma once

#include "prompt.h"

namespace scheinfer {
namespace {

// 16 rows, of which there are n_rows, from a column on of which n are left, transposed by pairs; zeros beyond.
template <class T>
inline void pairs_of(const typename T::Weight* w, int64_t stride, int64_t n_rows, int64_t n, __m512i (&v)[16]) {
  if (n_rows >= 16 && n >= T::STEP) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) v[r] = _mm512_loadu_si512(w + r * stride);
  } else {
    const __mmask32 some = n >= T::STEP ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
      v[r] = _mm512_maskz_loadu_epi16(r < n_rows ? some : 0, w + (r < n_rows ? r * stride : 0));
  }
  transpose(v);
}

// Rows as [pair][row], 16 rows after the other: reading 48 at once takes a third longer.
template <class T>
void pack(const typename T::Weight* w, int64_t n_rows, int64_t stride, int64_t n, char* panel) {
  const int64_t groups = (n_rows + 15) / 16;
  for (int64_t g = 0; g < groups; g++) {
    char* to = panel + g * 64;
    for (int64_t k = 0; k < n; k += T::STEP) {
      __m512i v[16];
      pairs_of<T>(w + 16 * g * stride + k, stride, n_rows - 16 * g, n - k, v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++, to += groups * 64) _mm512_store_si512(to, v[i]);
    }
  }
}

// out[m][r] = or += over n columns of a panel of R times 16 rows.
template <class T, int R, int M>
void from_panel(const char* panel, int64_t n_rows, int64_t n, const typename T::Input* const* x, int64_t k0, float* out,
                int64_t out_stride) {
  __mmask16 rows[R];
  for (int r = 0; r < R; r++) rows[r] = n_rows - 16 * r >= 16 ? 0xffff : __mmask16((1 << (n_rows - 16 * r)) - 1);
  __m512 sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      sum[m][r] = k0 ? _mm512_maskz_loadu_ps(rows[r], out + m * out_stride + 16 * r) : _mm512_setzero_ps();
  const typename T::Input* from[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) from[m] = x[m] + k0;
  for (int64_t k = 0; k < n; k += 2, panel += 64 * R) {
    typename T::W wv[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) wv[r] = T::load_weights(reinterpret_cast<const typename T::Weight*>(panel + 64 * r));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename T::X xv = T::broadcast(from[m] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[m][r] = T::add(sum[m][r], wv[r], xv);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) _mm512_mask_storeu_ps(out + m * out_stride + 16 * r, rows[r], sum[m][r]);
}

template <class T, int R, int M>
void from_panel_of(int tokens, const char* panel, int64_t n_rows, int64_t n, const typename T::Input* const* x,
                   int64_t k0, float* out, int64_t out_stride) {
  if (n_rows <= 16 * (R - 1)) {
    if constexpr (R > 1) from_panel_of<T, R - 1, M>(tokens, panel, n_rows, n, x, k0, out, out_stride);
  } else if (tokens < M) {
    if constexpr (M > 1) from_panel_of<T, R, M - 1>(tokens, panel, n_rows, n, x, k0, out, out_stride);
  } else {
    from_panel<T, R, M>(panel, n_rows, n, x, k0, out, out_stride);
  }
}

// A block of weights: n of K columns of some rows.
template <class T>
struct Part {
  const typename T::Weight* w;
  int64_t rows, n;
};

// The block of K from k0 on of the panel from row r on; beyond the last what is needed next, of as many rows.
template <class T>
Part<T> part_of(const Part<T>& all, int64_t r, int64_t k0, const typename T::Weight* next) {
  if (r >= all.rows) return {next, next ? (all.rows - 1) % PANEL_ROWS + 1 : 0, all.n < PANEL_K ? all.n : PANEL_K};
  return {all.w + r * all.n + k0, all.rows - r < PANEL_ROWS ? all.rows - r : PANEL_ROWS,
          all.n - k0 < PANEL_K ? all.n - k0 : PANEL_K};
}

// dots() of many tokens; what is needed next is fetched while they are multiplied.
template <class T>
void dots_of_many(const void* w, int64_t rows, int64_t K, const void* const* inputs, int64_t tokens, float* out,
                  int64_t out_stride, const void* later, float* scratch) {
  constexpr int64_t MOST = 8, BEGINNING = 8 * T::STEP;
  const Part<T> all{static_cast<const typename T::Weight*>(w), rows, K};
  const auto* next = static_cast<const typename T::Weight*>(later);
  const auto* x = reinterpret_cast<const typename T::Input* const*>(inputs);
  char* panel = reinterpret_cast<char*>(scratch);
  const Tiles tiles{tokens, (tokens + MOST - 1) / MOST};
  for (int64_t r = 0; r < rows; r += PANEL_ROWS)
    for (int64_t k0 = 0; k0 < K; k0 += PANEL_K) {
      const Part<T> now = part_of(all, r, k0, next);
      const Part<T> then = k0 + now.n < K ? part_of(all, r, k0 + now.n, next) : part_of(all, r + now.rows, 0, next);
      pack<T>(now.w, now.rows, K, now.n, panel);
      for (int64_t i = 0; i < tiles.n; i++) {
        for (int64_t a = i * then.rows / tiles.n; a < (i + 1) * then.rows / tiles.n; a++)
          for (int64_t k = 0; k < then.n; k += T::STEP) __builtin_prefetch(then.w + a * K + k, 0, 2);
        for (int64_t t = tiles.first(i + 1); t < tokens && t < tiles.first(i + 1) + MOST; t++)
          for (int64_t k = 0; k < now.n && k < BEGINNING; k += T::STEP) __builtin_prefetch(x[t] + k0 + k, 0, 3);
        const int64_t t = tiles.first(i);
        from_panel_of<T, PANEL_ROWS / 16, MOST>(tiles.n_tokens(i), panel, now.rows, now.n, x + t, k0,
                                                out + t * out_stride + r, out_stride);
      }
    }
}

}  // namespace
}  // namespace scheinfer
