// A prompt's attention by tiles: 16 neighbouring queries of a head are a tile's columns, keys or a value's columns its rows.
//
// So maxima, sums and scales of queries are lanes, and softmax needs no sum across them. Order of sums and maxima as in
// prompt.h: through keys, at fixed spans.
#pragma once

#include "amx.h"

namespace scheinfer {
namespace {

constexpr int64_t BLOCK_BYTES_PER_STEP = BLOCK_KEYS / SIDE * TILE_BYTES;

// n_keys keys as tiles [step of the width][16 keys four times][32 of the width], zeros beyond.
void pack_keys_as_tiles(const void* keys, int64_t n_keys, const Past& past, void* panel) {
  const auto* from = static_cast<const Bf16*>(keys);
  auto* to = static_cast<char*>(panel);
  for (int64_t d = 0; d < past.key_width; d += STEP, to += BLOCK_BYTES_PER_STEP)
    for (int64_t i = 0; i < BLOCK_KEYS; i++) {
      const __mmask32 some = i < n_keys ? first_of(past.key_width - d) : 0;
      _mm512_store_si512(to + i * LINE, _mm512_maskz_loadu_epi16(some, from + (some ? i * past.key_stride + d : 0)));
    }
}

// n_keys values as tiles [64 columns][32 keys twice][16 columns four times][32 keys], zeros beyond.
void pack_values_as_tiles(const void* values, int64_t n_keys, const Past& past, void* panel) {
  const auto* from = static_cast<const Bf16*>(values);
  auto* to = static_cast<char*>(panel);
  const auto row = [&](int64_t t, int64_t d) {
    const __mmask16 some = t < n_keys ? first16_of(past.value_width - d) : 0;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + (some ? t * past.value_stride + d : 0)));
  };
  for (int64_t d0 = 0; d0 < past.value_width; d0 += BLOCK_KEYS)
    for (int64_t t = 0; t < BLOCK_KEYS; t += STEP)
      for (int64_t d = d0; d < d0 + BLOCK_KEYS; d += SIDE, to += TILE_BYTES) {
        __m512i v[SIDE];
        for (int64_t i = 0; i < SIDE; i++)
          v[i] = _mm512_or_si512(row(t + 2 * i, d), _mm512_slli_epi32(row(t + 2 * i + 1, d), 16));
        transpose(v);
        for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * LINE, v[i]);
      }
}

// Of 16 queries: packed, scores of a span by key, their exponentials by pairs of keys, sums so far by column.
struct Queries {
  alignas(64) char packed[MOST_WIDTH / STEP * TILE_BYTES], weights[SPAN_KEYS / STEP * TILE_BYTES];
  alignas(64) float scores[SPAN_KEYS][SIDE], mixed[MOST_WIDTH][SIDE];
  __m512 top, sum;
};

// sums [64][16] = or += tiles [step][four] times columns, over some steps.
template <class Tiles>
inline void add_products(float* sums, bool begins, int64_t steps, const char* columns, const Tiles& tiles) {
  begin_sums<4>(sums, begins);
  for (int64_t i = 0; i < steps; i++) {
    const char* four = tiles(i);
    _tile_loadd(6, columns + i * TILE_BYTES, LINE);
    _tile_loadd(4, four, LINE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, four + TILE_BYTES, LINE);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, four + 2 * TILE_BYTES, LINE);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, four + 3 * TILE_BYTES, LINE);
    _tile_dpbf16ps(3, 5, 6);
  }
  store_sums<4>(sums);
}

// Scores of n keys, the first of which is before queries' own by `before`: their exponentials; how the sums before shrink.
inline __m512 soften(Queries& q, int64_t n, int64_t before, float scale) {
  const __m512 by = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
  const __m512i last = _mm512_add_epi32(_mm512_set1_epi32(int(before)),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const auto seen = [&](int64_t t) { return _mm512_cmple_epi32_mask(_mm512_set1_epi32(int(t)), last); };
  __m512 highest = none;
  for (int64_t t = 0; t < n; t++) {
    const __m512 v = _mm512_mask_mul_ps(none, seen(t), _mm512_load_ps(q.scores[t]), by);
    _mm512_store_ps(q.scores[t], v);
    highest = _mm512_max_ps(highest, v);
  }
  const __mmask16 higher = _mm512_cmp_ps_mask(highest, q.top, _CMP_GT_OQ);
  const __m512 now = _mm512_mask_mov_ps(q.top, higher, highest);
  __m512 sum = _mm512_setzero_ps();
  const auto weight = [&](int64_t t) {
    if (t >= n) return _mm512_setzero_ps();
    const __m512 e = _mm512_maskz_mov_ps(seen(t), exp_of(_mm512_sub_ps(_mm512_load_ps(q.scores[t]), now)));
    sum = _mm512_add_ps(sum, e);
    return e;
  };
  for (int64_t t = 0; t < n || t % STEP; t += 2) {
    const __m512 one = weight(t), other = weight(t + 1);
    _mm512_store_si512(q.weights + t / 2 * LINE, pairs_of(one, other));
  }
  const __m512 shrink = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), higher, exp_of(_mm512_sub_ps(q.top, now)));
  q.top = now, q.sum = _mm512_fmadd_ps(q.sum, shrink, sum);
  return shrink;
}

// Up to 16 queries one after the other, the first at a position: it sees that many keys and its own.
void attend_by_tiles(int n, const Blocks& blocks, const void* const* queries, int64_t position, const Past& past,
                     void* const* out) {
  static thread_local Queries q;
  _tile_loadconfig(&shapes);
  pack(queries, n, past.key_width, 0, 1, q.packed);
  q.top = _mm512_set1_ps(-INFINITY), q.sum = _mm512_setzero_ps();
  const int64_t n_all = position + n, key_steps = (past.key_width + STEP - 1) / STEP;
  for (int64_t first = 0; first < n_all; first += SPAN_KEYS) {
    const int64_t n_keys = n_all - first < SPAN_KEYS ? n_all - first : SPAN_KEYS, block = first / BLOCK_KEYS;
    written();
    for (int64_t t = 0; t < n_keys; t += BLOCK_KEYS) {
      const char* keys = blocks.keys + (block + t / BLOCK_KEYS) * blocks.key_bytes;
      add_products(q.scores[t], true, key_steps, q.packed, [=](int64_t i) { return keys + i * BLOCK_BYTES_PER_STEP; });
    }
    const __m512 shrink = soften(q, n_keys, position - first, past.scale);
    const bool shrinks = first && _mm512_cmp_ps_mask(shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
    const char* values = blocks.values + block * blocks.value_bytes;
    const int64_t each = blocks.value_bytes;
    for (int64_t d = 0; d < past.value_width; d += BLOCK_KEYS, values += blocks.panel_bytes) {
      for (int64_t i = d; shrinks && i < d + BLOCK_KEYS; i++)
        _mm512_store_ps(q.mixed[i], _mm512_mul_ps(_mm512_load_ps(q.mixed[i]), shrink));
      written();
      add_products(q.mixed[d], first == 0, (n_keys + STEP - 1) / STEP, q.weights,
                   [=](int64_t i) { return values + i / 2 * each + i % 2 * BLOCK_BYTES_PER_STEP; });
    }
  }
  _tile_release();
  const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), q.sum);
  for (int64_t d = 0; d < past.value_width; d += SIDE) {
    __m512i v[SIDE];
    for (int i = 0; i < SIDE; i++)
      v[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(q.mixed[d + i]), share));
    transpose(v);
    for (int m = 0; m < n; m++)
      _mm256_mask_storeu_epi16(static_cast<Bf16*>(out[m]) + d, first16_of(past.value_width - d),
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_castsi512_ps(v[m]))));
  }
}

}  // namespace
}  // namespace scheinfer
