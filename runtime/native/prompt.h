// A prompt's attention with AVX-512: each query over the keys up to its own, softmax with a running maximum.
//
// Keys and values are packed once per call, in blocks: by dwords (a float, or a pair of bfloat16), so that a vector
// holds 16 keys' or 16 columns' and a query's dword is broadcast. Sums run through a head's width and through the keys
// in one fixed order, and maxima move at fixed keys: a row's result depends neither on threads nor on other rows.
#pragma once

#include <immintrin.h>

#include "step.h"

namespace scheinfer {
namespace {

constexpr int WIDE = BLOCK_KEYS / 16;  // vectors that a block of keys, or of a value's columns, is wide

inline void transpose(__m512i* v) {
  __m512i a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512i p = _mm512_unpacklo_epi32(v[i], v[i + 1]), q = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i r = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), s = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    a[i] = _mm512_unpacklo_epi64(p, r), a[i + 1] = _mm512_unpackhi_epi64(p, r);
    a[i + 2] = _mm512_unpacklo_epi64(q, s), a[i + 3] = _mm512_unpackhi_epi64(q, s);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    const __m512i p = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), q = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), s = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(p, r, 0x88), v[i + 8] = _mm512_shuffle_i32x4(p, r, 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(q, s, 0x88), v[i + 12] = _mm512_shuffle_i32x4(q, s, 0xdd);
  }
}

// n elements from `from` and zeros up to `to`'s length.
template <class Element>
void fill(Element* to, int64_t length, const Element* from, int64_t n) {
  if (n > 0) memcpy(to, from, size_t(n) * sizeof(Element));
  memset(static_cast<void*>(to + (n > 0 ? n : 0)), 0, size_t(length - (n > 0 ? n : 0)) * sizeof(Element));
}

// Up to STEP elements as 16 dwords of activations, then zeros.
template <class T>
inline __m512i step_of(const typename T::Weight* from, int64_t n) {
  if (n >= T::STEP) return T::dwords(from);
  alignas(64) typename T::Weight rest[T::STEP];
  fill(rest, T::STEP, from, n);
  return T::dwords(rest);
}

// n_keys keys as [step][key], keys beyond them zeros; a step is a dword of the head's width.
template <class T>
void pack_keys(const void* keys, int64_t n_keys, const Past& past, void* panel) {
  const auto* from = static_cast<const typename T::Weight*>(keys);
  auto* to = static_cast<char*>(panel);
  for (int64_t d = 0; d < past.key_width; d += T::STEP, to += 16 * WIDE * 64)
    for (int g = 0; g < WIDE; g++) {
      __m512i v[16];
      for (int i = 0; i < 16; i++)
        v[i] = 16 * g + i < n_keys ? step_of<T>(from + (16 * g + i) * past.key_stride + d, past.key_width - d)
                                   : _mm512_setzero_si512();
      transpose(v);
      for (int i = 0; i < 16; i++) _mm512_store_si512(to + (i * WIDE + g) * 64, v[i]);
    }
}

// n_keys values as [panel of columns][step][column]; a step is a dword of keys.
template <class T>
void pack_values(const void* values, int64_t n_keys, const Past& past, void* panel) {
  constexpr int EACH = T::STEP / 16;
  const auto* from = static_cast<const typename T::Weight*>(values);
  auto* to = static_cast<char*>(panel);
  for (int64_t d0 = 0; d0 < past.value_width; d0 += BLOCK_KEYS)
    for (int64_t t = 0; t < BLOCK_KEYS; t += EACH)
      for (int64_t d = d0; d < d0 + BLOCK_KEYS; d += 16, to += 64) {
        alignas(64) typename T::Weight rows[EACH][16];
        for (int e = 0; e < EACH; e++) {
          const int64_t rest = t + e < n_keys ? past.value_width - d : 0;
          fill(rows[e], 16, from + (t + e) * past.value_stride + d, rest < 16 ? rest : 16);
        }
        _mm512_store_si512(to, T::columns(rows[0]));
      }
}

// sum[m][r] += over steps of a panel's 16 columns r times row m's dword.
template <class T, int M>
inline void add_steps(const char* panel, int64_t steps, const typename T::Input* x, int64_t x_stride,
                      __m512 (&sum)[M][WIDE]) {
  constexpr int EACH = T::STEP / 16;
  for (int64_t s = 0; s < steps; s++, panel += WIDE * 64, x += EACH) {
    typename T::W wv[WIDE];
#pragma GCC unroll 16
    for (int r = 0; r < WIDE; r++) wv[r] = T::load_weights(reinterpret_cast<const typename T::Input*>(panel + 64 * r));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename T::X xv = T::broadcast(x + m * x_stride);
#pragma GCC unroll 16
      for (int r = 0; r < WIDE; r++) sum[m][r] = T::add(sum[m][r], wv[r], xv);
    }
  }
}

inline __m512 exp_of(__m512 v) {  // the scalar one's
  v = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), v));  // of NaN: the second
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  const float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (const float c : rest) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// A tile's queries, scores of one span of keys, exponentials of them, sums so far.
template <class T>
struct Tile {
  static constexpr int ROWS_OF = 6;
  alignas(64) typename T::Input query[ROWS_OF][MOST_WIDTH], weights[ROWS_OF][SPAN_KEYS];
  alignas(64) float scores[ROWS_OF][SPAN_KEYS], mixed[ROWS_OF][MOST_WIDTH];
  float top[ROWS_OF], sum[ROWS_OF], scale[ROWS_OF];
};

template <class T, int M>
void score(Tile<T>& tile, const char* panel, int64_t steps, int64_t at) {
  __m512 sum[M][WIDE];
  for (auto& row : sum)
    for (auto& v : row) v = _mm512_setzero_ps();
  add_steps<T, M>(panel, steps, tile.query[0], MOST_WIDTH, sum);
  for (int m = 0; m < M; m++)
    for (int r = 0; r < WIDE; r++) _mm512_store_ps(tile.scores[m] + at + 16 * r, sum[m][r]);
}

// The first of n vectors' lanes, none for n below 1.
inline __mmask16 first_lanes(int64_t n) { return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); }

// Where spans of keys begin that a query at a position sees some of, or a later one does.
inline int64_t first_span(int64_t position, const Past& past) {
  const int64_t hidden = position + 1 - past.window;
  return hidden > 0 ? hidden / SPAN_KEYS * SPAN_KEYS : 0;
}

// Before a softmax with sinks or windows: as if a key of that score had come first. With a window a span may hold none
// that a query sees: so low a number is below all scores, and its difference to them is not NaN.
inline float first_top(const Past& past) {
  return past.sink > -INFINITY || past.window == NO_WINDOW ? past.sink : -1e30f;
}

// Row m's scores of which it sees those from `hidden` up to n, of n_keys: their exponentials, and how the sums before
// shrink.
template <class T>
void soften(Tile<T>& tile, int m, int64_t hidden, int64_t n, int64_t n_keys, float scale) {
  const __m512 by = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
  const auto seen = [=](int64_t t) { return __mmask16(first_lanes(n - t) & ~first_lanes(hidden - t)); };
  __m512 top = none;
  for (int64_t t = 0; t < n_keys; t += 16) {
    const __m512 v = _mm512_mask_mul_ps(none, seen(t), _mm512_load_ps(tile.scores[m] + t), by);
    _mm512_store_ps(tile.scores[m] + t, v);
    top = _mm512_max_ps(top, v);
  }
  const float before = tile.top[m], highest = _mm512_reduce_max_ps(top), now = highest > before ? highest : before;
  const __m512 shift = _mm512_set1_ps(now);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < n_keys; t += 16) {
    const __m512 e = _mm512_maskz_mov_ps(seen(t), exp_of(_mm512_sub_ps(_mm512_load_ps(tile.scores[m] + t), shift)));
    sum = _mm512_add_ps(sum, e);
    T::store16(e, tile.weights[m] + t);
  }
  tile.top[m] = now, tile.scale[m] = before < now ? exp_of(before - now) : 1.0f;
  tile.sum[m] = tile.sum[m] * tile.scale[m] + _mm512_reduce_add_ps(sum);
}

// Values of n_keys keys from the first of a span, block_bytes apart, by their weights; one panel of columns.
template <class T, int M>
void mix(Tile<T>& tile, const char* panel, int64_t block_bytes, int64_t n_keys, int64_t column) {
  constexpr int EACH = T::STEP / 16;
  __m512 sum[M][WIDE];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < WIDE; r++)
      sum[m][r] = _mm512_mul_ps(_mm512_load_ps(tile.mixed[m] + column + 16 * r), _mm512_set1_ps(tile.scale[m]));
  for (int64_t t = 0; t < n_keys; t += BLOCK_KEYS, panel += block_bytes) {
    const int64_t n = n_keys - t < BLOCK_KEYS ? n_keys - t : BLOCK_KEYS;
    add_steps<T, M>(panel, (n + EACH - 1) / EACH, tile.weights[0] + t, SPAN_KEYS, sum);
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < WIDE; r++) _mm512_store_ps(tile.mixed[m] + column + 16 * r, sum[m][r]);
}

// M queries one after the other, the first at a position: it sees that many keys and its own.
template <class T, int M>
void attend_tile(const Blocks& blocks, const void* const* queries, int64_t position, const Past& past, void* const* out) {
  using Wide = typename T::Widened;
  static thread_local Tile<Wide> tile;
  const int64_t steps = (past.key_width + T::STEP - 1) / T::STEP * 16, n_keys = position + M;
  for (int m = 0; m < M; m++) {
    load_row<T>(queries[m], past.key_width, tile.query[m]);
    tile.top[m] = first_top(past), tile.sum[m] = past.sink > -INFINITY ? 1.0f : 0.0f;
    memset(tile.mixed[m], 0, sizeof(tile.mixed[m]));
  }
  for (int64_t first = first_span(position, past); first < n_keys; first += SPAN_KEYS) {
    const int64_t n = n_keys - first < SPAN_KEYS ? n_keys - first : SPAN_KEYS, block = first / BLOCK_KEYS;
    for (int64_t t = 0; t < n; t += BLOCK_KEYS)
      score<Wide, M>(tile, blocks.keys + (block + t / BLOCK_KEYS) * blocks.key_bytes, steps, t);
    for (int m = 0; m < M; m++) {
      const int64_t seen = position + m + 1 - first;
      soften<Wide>(tile, m, seen - past.window, seen, (n + 31) / 32 * 32, past.scale);
    }
    for (int64_t d = 0; d < past.value_width; d += BLOCK_KEYS)
      mix<Wide, M>(tile, blocks.values + block * blocks.value_bytes + d / BLOCK_KEYS * blocks.panel_bytes,
                   blocks.value_bytes, n, d);
  }
  for (int m = 0; m < M; m++) {
    for (int64_t d = 0; d < past.value_width; d++) tile.mixed[m][d] /= tile.sum[m];
    store_row<T>(tile.mixed[m], past.value_width, out[m]);
  }
}

template <class T, int M>
void attend_rows(int n, const Blocks& blocks, const void* const* queries, int64_t position, const Past& past,
                 void* const* out) {
  if (n == M)
    attend_tile<T, M>(blocks, queries, position, past, out);
  else if constexpr (M > 1)
    attend_rows<T, M - 1>(n, blocks, queries, position, past, out);
}

template <class T>
const Kernels* prompt_kernels_of() {
  static const Kernels found = [] {
    Kernels k = *kernels_of<T>();
    k.few_queries = sizeof(typename T::Weight) == 4 ? 32 : sizeof(typename T::Input) == 4 ? 12 : 8;
    k.pack_keys = pack_keys<T>, k.pack_values = pack_values<T>, k.attend_rows = attend_rows<T, 6>;
    return k;
  }();
  return &found;
}

}  // namespace
}  // namespace scheinfer
