// Many tokens: rows of W side by side in a vector, a token's dword broadcast, so that no sum crosses lanes.
//
// 48 rows are transposed by dwords (a float, or a pair of bfloat16) into a panel that stays in the second cache and is
// used for all tokens; narrower weights than activations are widened on the way. A tile needs one line of a token's
// activations in 16 steps, so little that what siblings leave of the first cache is enough. Sums run through K dword
// after dword, in blocks, whatever the threads and other tokens, but not in the order of tile.h.
#pragma once

#include "prompt.h"

namespace scheinfer {
namespace {

template <class T>
constexpr int64_t EACH = T::STEP / 16;  // columns in a dword
template <class T>
constexpr int64_t AT_ONCE = PANEL_K / 2 * EACH<T>;  // columns of a panel
template <class T>
constexpr int64_t IN_A_ROW = EACH<T> > 1 ? AT_ONCE<T> : 256;  // added one after the other: floats lose by long sums

// Rows as [dword][row], zeros beyond them; 16 rows after the other: reading 48 at once takes a third longer.
template <class T>
void pack(const typename T::Weight* w, int64_t n_rows, int64_t stride, int64_t n, char* panel) {
  const int64_t groups = (n_rows + 15) / 16;
  for (int64_t g = 0; g < groups; g++) {
    char* to = panel + g * 64;
    const typename T::Weight* from = w + 16 * g * stride;
    for (int64_t k = 0; k < n; k += T::STEP) {
      __m512i v[16];
      if (n_rows >= 16 * (g + 1) && k + T::STEP <= n) {
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) v[r] = T::dwords(from + r * stride + k);
      } else {
        for (int r = 0; r < 16; r++)
          v[r] = 16 * g + r < n_rows ? step_of<T>(from + r * stride + k, n - k) : _mm512_setzero_si512();
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++, to += groups * 64) _mm512_store_si512(to, v[i]);
    }
  }
}

// Lines of rows of weights that are needed next, fetched few at a time: all at once they hold up whatever comes after.
template <class T>
struct Ahead {
  const typename T::Weight* row;
  int64_t k, n, stride, left, each;
  void fetch() {
    for (int64_t i = 0; i < each && left > 0; i++, left--) {
      __builtin_prefetch(row + k, 0, 2);
      k += line<typename T::Weight>;
      if (k >= n) k = 0, row += stride;
    }
  }
};

// out[m][r] = or += over n columns of a panel of R times 16 rows.
template <class T, int R, int M>
void from_panel(const char* panel, int64_t n_rows, int64_t n, const typename T::Input* const* x, int64_t k0, float* out,
                int64_t out_stride, Ahead<T>& ahead) {
  using Wide = typename T::Widened;
  __mmask16 rows[R];
  for (int r = 0; r < R; r++) rows[r] = n_rows - 16 * r >= 16 ? 0xffff : __mmask16((1 << (n_rows - 16 * r)) - 1);
  __m512 sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      sum[m][r] = k0 && EACH<T> > 1 ? _mm512_maskz_loadu_ps(rows[r], out + m * out_stride + 16 * r) : _mm512_setzero_ps();
  const typename T::Input* from[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) from[m] = x[m] + k0;
  for (int64_t k = 0; k < n;) {
    ahead.fetch();
    for (const int64_t end = k + T::STEP < n ? k + T::STEP : n; k < end; k += EACH<T>, panel += 64 * R) {
      typename T::W wv[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) wv[r] = Wide::load_weights(reinterpret_cast<const typename Wide::Weight*>(panel + 64 * r));
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const typename T::X xv = T::broadcast(from[m] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) sum[m][r] = T::add(sum[m][r], wv[r], xv);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float* to = out + m * out_stride + 16 * r;
      if (k0 && EACH<T> == 1) sum[m][r] = _mm512_add_ps(_mm512_maskz_loadu_ps(rows[r], to), sum[m][r]);
      _mm512_mask_storeu_ps(to, rows[r], sum[m][r]);
    }
}

template <class T, int R, int M>
void from_panel_of(int tokens, const char* panel, int64_t n_rows, int64_t n, const typename T::Input* const* x,
                   int64_t k0, float* out, int64_t out_stride, Ahead<T>& ahead) {
  if (n_rows <= 16 * (R - 1)) {
    if constexpr (R > 1) from_panel_of<T, R - 1, M>(tokens, panel, n_rows, n, x, k0, out, out_stride, ahead);
  } else if (tokens < M) {
    if constexpr (M > 1) from_panel_of<T, R, M - 1>(tokens, panel, n_rows, n, x, k0, out, out_stride, ahead);
  } else {
    from_panel<T, R, M>(panel, n_rows, n, x, k0, out, out_stride, ahead);
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
  if (r >= all.rows) return {next, next ? (all.rows - 1) % PANEL_ROWS + 1 : 0, all.n < AT_ONCE<T> ? all.n : AT_ONCE<T>};
  return {all.w + r * all.n + k0, all.rows - r < PANEL_ROWS ? all.rows - r : PANEL_ROWS,
          all.n - k0 < AT_ONCE<T> ? all.n - k0 : AT_ONCE<T>};
}

// dots() of many tokens; what is needed next is fetched while they are multiplied.
template <class T>
void dots_of_many(const void* w, int64_t rows, int64_t K, const void* const* inputs, int64_t tokens, float* out,
                  int64_t out_stride, const void* later, float* scratch) {
  constexpr int64_t MOST = 8, BEGINNING = 8 * T::STEP, LINE = line<typename T::Weight>;
  const Part<T> all{static_cast<const typename T::Weight*>(w), rows, K};
  const auto* next = static_cast<const typename T::Weight*>(later);
  const auto* x = reinterpret_cast<const typename T::Input* const*>(inputs);
  char* panel = reinterpret_cast<char*>(scratch);
  const Tiles tiles{tokens, (tokens + MOST - 1) / MOST};
  for (int64_t r = 0; r < rows; r += PANEL_ROWS)
    for (int64_t k0 = 0; k0 < K; k0 += AT_ONCE<T>) {
      const Part<T> now = part_of(all, r, k0, next);
      const Part<T> then = k0 + now.n < K ? part_of(all, r, k0 + now.n, next) : part_of(all, r + now.rows, 0, next);
      const int64_t lines = (then.n + LINE - 1) / LINE * then.rows, steps = (now.n + T::STEP - 1) / T::STEP * tiles.n;
      Ahead<T> ahead{then.w, 0, then.n, K, lines, (lines + steps - 1) / steps};
      pack<T>(now.w, now.rows, K, now.n, panel);
      for (int64_t i = 0; i < tiles.n; i++) {
        for (int64_t t = tiles.first(i + 1); t < tokens && t < tiles.first(i + 1) + MOST; t++)
          for (int64_t k = 0; k < now.n && k < BEGINNING; k += T::STEP) __builtin_prefetch(x[t] + k0 + k, 0, 3);
        const int64_t t = tiles.first(i);
        for (int64_t k = 0; k < now.n; k += IN_A_ROW<T>)
          from_panel_of<T, PANEL_ROWS / 16, MOST>(
              tiles.n_tokens(i), panel + k / EACH<T> * ((now.rows + 15) / 16 * 64), now.rows,
              now.n - k < IN_A_ROW<T> ? now.n - k : IN_A_ROW<T>, x + t, k0 + k, out + t * out_stride + r, out_stride, ahead);
      }
    }
}

template <class T>
const Kernels* panel_kernels_of() {
  static const Kernels found = [] {
    Kernels k = *prompt_kernels_of<T>();
    k.dots_of_many = dots_of_many<T>;
    k.many = EACH<T> > 1 ? 96 : sizeof(typename T::Weight) < 4 ? 32 : 48;  // tiles widen the narrow ones, too
    return k;
  }();
  return &found;
}

}  // namespace
}  // namespace scheinfer
