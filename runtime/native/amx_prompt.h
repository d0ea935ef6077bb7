// A prompt's attention by tiles: 16 neighbouring queries of a head are a tile's columns, keys or a value's columns its rows.
//
// So maxima, sums and scales of queries are lanes, and softmax needs no sum across them. Order of sums and maxima as in
// prompt.h: through keys, at fixed spans.
#pragma once

#include "amx.h"

namespace scheinfer {
namespace {

constexpr float LOG2_E = 1.44269504f;
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

// Of 16 queries: packed, scores of a span by key, their powers by pairs of keys, sums so far by column.
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

// 2^v for v of 0 and less, within 4e-6 of it: what it weighs is rounded to bfloat16.
inline __m512 power_of_two(__m512 v) {
  v = _mm512_max_ps(_mm512_set1_ps(-126.0f), v);  // of NaN: the second
  const __m512 n = _mm512_roundscale_ps(v, 8), r = _mm512_sub_ps(v, n);
  __m512 p = _mm512_set1_ps(9.6760370979e-3f);
  const float rest[] = {5.5922035647e-2f, 2.4022107356e-1f, 6.9312103399e-1f, 1.0f};
  for (const float c : rest) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// Scores of n keys, the first of which is before queries' own by `before`, where a window hides them; how many keys it
// hides from some query.
inline int64_t hide(Queries& q, int64_t n, int64_t before, int64_t window) {
  const int64_t shown = before - window + SIDE, n_hidden = shown < 0 ? 0 : shown < n ? shown : n;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t t = 0; t < n_hidden; t++) {
    const __mmask16 hidden = _mm512_cmpgt_epi32_mask(lanes, _mm512_set1_epi32(int(t - (before - window) - 1)));
    _mm512_store_ps(q.scores[t], _mm512_mask_mov_ps(_mm512_load_ps(q.scores[t]), hidden, _mm512_set1_ps(-INFINITY)));
  }
  return n_hidden;
}

// Scores of n keys, the first of which is before queries' own by `before`: powers of two of them by a scale above 0; how
// the sums before shrink. Of the first n_hidden some may be hidden.
inline __m512 soften(Queries& q, int64_t n, int64_t before, int64_t n_hidden, float scale) {
  const __m512 by = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
  const __m512i last = _mm512_add_epi32(_mm512_set1_epi32(int(before)),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const auto seen = [&](int64_t t) { return _mm512_cmple_epi32_mask(_mm512_set1_epi32(int(t)), last); };
  const int64_t by_all = before < 0 ? 0 : (before + 1 < n ? before + 1 : n) / 2 * 2;  // keys that all queries see; even
  __m512 highest = none;
  for (int64_t t = 0; t < by_all; t++) highest = _mm512_max_ps(highest, _mm512_load_ps(q.scores[t]));
  for (int64_t t = by_all; t < n; t++)
    highest = _mm512_max_ps(highest, _mm512_mask_load_ps(none, seen(t), q.scores[t]));
  highest = _mm512_mul_ps(highest, by);
  const __mmask16 higher = _mm512_cmp_ps_mask(highest, q.top, _CMP_GT_OQ);
  const __m512 now = _mm512_mask_mov_ps(q.top, higher, highest);
  __m512 sum = _mm512_setzero_ps(), other_sum = sum;
  const auto weight = [&](int64_t t) { return power_of_two(_mm512_fmsub_ps(_mm512_load_ps(q.scores[t]), by, now)); };
  const auto shown_weight = [&](int64_t t) {  // 0, not next to it: a hidden value may be infinite
    const __mmask16 shown = t < n_hidden ? _mm512_cmp_ps_mask(_mm512_load_ps(q.scores[t]), none, _CMP_NEQ_UQ) : 0xffff;
    return _mm512_maskz_mov_ps(shown, weight(t));
  };
  const auto seen_weight = [&](int64_t t) {
    return t < n ? _mm512_maskz_mov_ps(seen(t), shown_weight(t)) : _mm512_setzero_ps();
  };
  const auto add = [&](int64_t t, __m512 one, __m512 other) {
    sum = _mm512_add_ps(sum, one), other_sum = _mm512_add_ps(other_sum, other);
    _mm512_store_si512(q.weights + t / 2 * LINE, pairs_of(one, other));
  };
  int64_t t = 0;
  for (; t < n_hidden && t < by_all; t += 2) add(t, shown_weight(t), shown_weight(t + 1));
  for (; t < by_all; t += 2) add(t, weight(t), weight(t + 1));
  for (; t < n || t % STEP; t += 2) add(t, seen_weight(t), seen_weight(t + 1));
  const __m512 shrink = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), higher, power_of_two(_mm512_sub_ps(q.top, now)));
  q.top = now, q.sum = _mm512_fmadd_ps(q.sum, shrink, _mm512_add_ps(sum, other_sum));
  return shrink;
}

// Up to 16 queries one after the other, the first at a position: it sees that many keys and its own.
void attend_by_tiles(int n, const Blocks& blocks, const void* const* queries, int64_t position, const Past& past,
                     void* const* out) {
  static thread_local Queries q;
  _tile_loadconfig(&shapes);
  pack(queries, n, past.key_width, 0, 1, q.packed);
  q.top = _mm512_set1_ps(first_top(past) * LOG2_E), q.sum = _mm512_set1_ps(past.sink > -INFINITY ? 1.0f : 0.0f);
  const int64_t n_all = position + n, key_steps = (past.key_width + STEP - 1) / STEP, begin = first_span(position, past);
  for (int64_t first = begin; first < n_all; first += SPAN_KEYS) {
    const int64_t n_keys = n_all - first < SPAN_KEYS ? n_all - first : SPAN_KEYS, block = first / BLOCK_KEYS;
    written();
    for (int64_t t = 0; t < n_keys; t += BLOCK_KEYS) {
      const char* keys = blocks.keys + (block + t / BLOCK_KEYS) * blocks.key_bytes;
      add_products(q.scores[t], true, key_steps, q.packed, [=](int64_t i) { return keys + i * BLOCK_BYTES_PER_STEP; });
    }
    const int64_t n_hidden = past.window < n_all ? hide(q, n_keys, position - first, past.window) : 0;
    const __m512 shrink = soften(q, n_keys, position - first, n_hidden, past.scale * LOG2_E);
    const bool shrinks = first > begin && _mm512_cmp_ps_mask(shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
    const char* values = blocks.values + block * blocks.value_bytes;
    const int64_t each = blocks.value_bytes;
    for (int64_t d = 0; d < past.value_width; d += BLOCK_KEYS, values += blocks.panel_bytes) {
      for (int64_t i = d; shrinks && i < d + BLOCK_KEYS; i++)
        _mm512_store_ps(q.mixed[i], _mm512_mul_ps(_mm512_load_ps(q.mixed[i]), shrink));
      written();
      add_products(q.mixed[d], first == begin, (n_keys + STEP - 1) / STEP, q.weights,
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
