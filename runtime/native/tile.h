// The arithmetic, compiled once per instruction set: each includes this file with its own vectors.
//
// A tile is ROWS rows of W times up to T::TOKENS tokens, all sums in registers, both sides read along K, so nothing
// has to be packed. Every sum runs through K in one fixed order, in blocks of T::BLOCK: results depend neither on the
// number of threads nor on what other tokens are in the batch (but where panel.h takes many of them).
#pragma once

#include <cmath>
#include <cstring>

#include "kernel.h"

namespace scheinfer {
namespace {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// -- numbers ---------------------------------------------------------------------------------------------------------

struct Bf16 {
  uint16_t raw;
};
struct F16bits {
  uint16_t raw;
};

inline float widen(float v) { return v; }
inline float widen(Bf16 v) { return bits<float>(uint32_t(v.raw) << 16); }
inline float widen(F16bits v) {
  const uint32_t rest = uint32_t(v.raw & 0x7fff) << 13;
  const float scaled = bits<float>(rest) * bits<float>(uint32_t(0x77800000));  // 2^112 puts the exponent right
  const uint32_t special = rest >= 0x0f800000 ? uint32_t(0x7f800000) : 0;      // infinities and NaN
  return bits<float>(bits<uint32_t>(scaled) | special | uint32_t(v.raw & 0x8000) << 16);
}

inline void narrow(float v, float& to) { to = v; }
inline void narrow(float v, Bf16& to) {
  const uint32_t u = bits<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.raw = uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
inline void narrow(float v, F16bits& to) {
  const uint32_t u = bits<uint32_t>(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  const uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  const uint32_t small = bits<uint32_t>(bits<float>(rest) + 0.5f) - bits<uint32_t>(0.5f);  // the adder rounds
  uint32_t half = rest < 0x38800000 ? small : normal;
  half = rest >= 0x477ff000 ? 0x7c00 : half;
  half = rest > 0x7f800000 ? 0x7e00 : half;
  to.raw = uint16_t(sign | half);
}

inline float exp_of(float v) {  // within 2 units in the last place; vectorises
  v = v < -87.0f ? -87.0f : v > 88.0f ? 88.0f : v;
  const float magic = 12582912.0f, n = (v * 1.44269504f + magic) - magic;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits<float>(uint32_t(int32_t(n) + 127) << 23);
}

inline float act_of(float v, int act) {
  if (act == SILU) return v / (1.0f + exp_of(-v));
  if (act == GELU_TANH) {
    const float z = 0.7978845608f * (v + 0.044715f * v * v * v);
    return v - v / (1.0f + exp_of(2.0f * z));  // 0.5 v (1 + tanh z)
  }
  return 0.5f * v * erfcf(-0.7071067812f * v);
}

// -- tiles -----------------------------------------------------------------------------------------------------------

template <class Element>
constexpr int64_t line = 64 / int64_t(sizeof(Element));  // of the cache, in elements

// T: Weight, Input (element types), W (vector of weights), X, Sum (vectors), STEP elements per vector, BLOCK of K, TOKENS
// AHEAD rows of weights that come later are fetched meanwhile.
template <class T, int R, int M, int AHEAD>
void tile(const typename T::Weight* w, int64_t stride, int64_t n, const typename T::Input* const* x, int64_t k0,
          float* out, int64_t out_stride, const typename T::Weight* ahead) {
  typename T::Sum sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[m][r] = T::zero();
  const typename T::Input* rows[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) rows[m] = x[m] + k0;
  const auto step = [&](int64_t k) {
    typename T::W wv[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) wv[r] = T::load_weights(w + r * stride + k);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename T::X xv = T::load_input(rows[m] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[m][r] = T::add(sum[m][r], wv[r], xv);
    }
  };
  constexpr int64_t LINE = line<typename T::Weight> > T::STEP ? line<typename T::Weight> : T::STEP;
  int64_t k = 0;
  for (; k + LINE <= n; k += LINE) {
#pragma GCC unroll 16
    for (int r = 0; r < AHEAD; r++) __builtin_prefetch(ahead + r * stride + k, 0, 3);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LINE; i += T::STEP) step(k + i);
  }
  for (; k + T::STEP <= n; k += T::STEP) step(k);
  if (k < n) {  // x goes on with zeros, W does not
    alignas(64) typename T::Weight rest[R][T::STEP];
    memset(rest, 0, sizeof(rest));
    for (int r = 0; r < R; r++) memcpy(rest[r], w + r * stride + k, size_t(n - k) * sizeof(rest[0][0]));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename T::X xv = T::load_input(rows[m] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[m][r] = T::add(sum[m][r], T::load_weights(rest[r]), xv);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    float total[R];
    T::template totals<R>(sum[m], total);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) out[m * out_stride + r] = k0 ? out[m * out_stride + r] + total[r] : total[r];
  }
}

template <class T, int R, int M>
void tile_of(int tokens, int n_ahead, const typename T::Weight* w, int64_t stride, int64_t n,
             const typename T::Input* const* x, int64_t k0, float* out, int64_t out_stride,
             const typename T::Weight* ahead) {
  if (tokens < M) {
    if constexpr (M > 1) tile_of<T, R, M - 1>(tokens, n_ahead, w, stride, n, x, k0, out, out_stride, ahead);
  } else if (n_ahead >= 4) {
    tile<T, R, M, 4>(w, stride, n, x, k0, out, out_stride, ahead);
  } else if (n_ahead >= 2) {
    tile<T, R, M, 2>(w, stride, n, x, k0, out, out_stride, ahead);
  } else if (n_ahead == 1) {
    tile<T, R, M, 1>(w, stride, n, x, k0, out, out_stride, ahead);
  } else {
    tile<T, R, M, 0>(w, stride, n, x, k0, out, out_stride, ahead);
  }
}

constexpr int64_t FEW = 4;  // tiles of tokens

// Tokens in as few tiles as possible, of sizes as equal as possible: small ones leave the multipliers waiting.
struct Tiles {
  int64_t tokens, n;
  int64_t first(int64_t i) const { return i * tokens / n; }
  int n_tokens(int64_t i) const { return int(first(i + 1) - first(i)); }
};
template <class T>
Tiles tiles_of(int64_t tokens) {
  return {tokens, (tokens + T::TOKENS - 1) / T::TOKENS};
}

// One group of rows, one block of K, one tile of tokens. Of the weights that come later each tile fetches a share.
template <class T, int R>
void group(const typename T::Weight* w, int64_t stride, int64_t n, const typename T::Input* const* x, int64_t k0,
           float* out, int64_t out_stride, const typename T::Weight* ahead, const Tiles& tiles, int64_t i) {
  const int64_t first = i * R / tiles.n, n_ahead = ahead ? (i + 1) * R / tiles.n - first : 0;
  const int64_t t = tiles.first(i);
  tile_of<T, R, T::TOKENS>(tiles.n_tokens(i), int(n_ahead), w, stride, n, x + t, k0, out + t * out_stride, out_stride,
                           ahead + (ahead ? first * stride : 0));
}

// Few tokens: weights come from memory once, fastest in four streams without gaps, each fetched some lines ahead by hand;
// at their end the beginnings of the streams that are needed next. CPUs differ in how far they read ahead by themselves.
template <class T>
void stream(const typename T::Weight* w, int64_t rows, int64_t K, const typename T::Input* const* x, int64_t tokens,
            float* out, int64_t out_stride, const typename T::Weight* next) {
  constexpr int64_t AHEAD = 32 * line<typename T::Weight>;
  const int64_t share = rows / ROWS, end = share * K;
  const Tiles tiles = tiles_of<T>(tokens);
  for (int64_t r = 0; r < share; r++) {
    float found[FEW * T::TOKENS * ROWS];
    for (int64_t k0 = 0; k0 < K; k0 += T::BLOCK) {
      const int64_t n = K - k0 < T::BLOCK ? K - k0 : T::BLOCK, at = r * K + k0, fetched = at + AHEAD;
      const typename T::Weight* ahead = fetched + n / 2 < end ? w + fetched : next ? next + (fetched > end ? fetched - end : 0) : nullptr;
      for (int64_t i = 0; i < tiles.n; i++) group<T, ROWS>(w + at, end, n, x, k0, found, ROWS, ahead, tiles, i);
    }
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < ROWS; i++) out[t * out_stride + i * share + r] = found[t * ROWS + i];
  }
}

// Many tokens: a tile of x stays in the first cache, a block of W and all of x's in the second.
template <class T>
void many(const typename T::Weight* w, int64_t rows, int64_t K, const typename T::Input* const* x, int64_t tokens,
          float* out, int64_t out_stride, const typename T::Weight* next) {
  const Tiles tiles = tiles_of<T>(tokens);
  for (int64_t k0 = 0; k0 < K; k0 += T::BLOCK) {
    const bool last = k0 + T::BLOCK >= K;
    const int64_t n = last ? K - k0 : T::BLOCK;
    const typename T::Weight* ahead = last ? next : w + k0 + T::BLOCK;
    for (int64_t i = 0; i < tiles.n; i++)
      for (int64_t r = 0; r < rows; r += ROWS)
        group<T, ROWS>(w + r * K + k0, K, n, x, k0, out + r, out_stride, ahead ? ahead + r * K : nullptr, tiles, i);
  }
}

// Many tokens and weights that cannot be multiplied as they are: widened once for all tokens.
template <class T>
void widened(const typename T::Weight* w, int64_t rows, int64_t K, const typename T::Input* const* x, int64_t tokens,
             float* out, int64_t out_stride, float* scratch) {
  const Tiles tiles = tiles_of<T>(tokens);
  for (int64_t k0 = 0; k0 < K; k0 += T::BLOCK)
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t n = K - k0 < T::BLOCK ? K - k0 : T::BLOCK;
      for (int64_t i = 0; i < ROWS; i++) T::widen_row(w + (r + i) * K + k0, n, scratch + i * T::BLOCK);
      for (int64_t i = 0; i < tiles.n; i++)
        group<typename T::Widened, ROWS>(scratch, T::BLOCK, n, x, k0, out + r, out_stride, nullptr, tiles, i);
    }
}

template <class T>
void dots(const void* weights, int64_t rows, int64_t K, const void* const* inputs, int64_t tokens, float* out,
          int64_t out_stride, const void* later, float* scratch) {
  const auto *w = static_cast<const typename T::Weight*>(weights), *next = static_cast<const typename T::Weight*>(later);
  const auto* x = reinterpret_cast<const typename T::Input* const*>(inputs);
  const int64_t whole = rows / ROWS * ROWS;
  if (tokens <= FEW * T::TOKENS)
    stream<T>(w, whole, K, x, tokens, out, out_stride, next);
  else if constexpr (sizeof(typename T::Weight) < sizeof(typename T::Input))
    widened<T>(w, whole, K, x, tokens, out, out_stride, scratch);
  else
    many<T>(w, whole, K, x, tokens, out, out_stride, next);
  const Tiles tiles = tiles_of<T>(tokens);
  for (int64_t r = whole; r < rows; r++)
    for (int64_t k0 = 0; k0 < K; k0 += T::BLOCK)
      for (int64_t i = 0; i < tiles.n; i++)
        group<T, 1>(w + r * K + k0, K, K - k0 < T::BLOCK ? K - k0 : T::BLOCK, x, k0, out + r, out_stride, nullptr, tiles,
                    i);
}

// -- rows ------------------------------------------------------------------------------------------------------------

template <class T>
void load_row(const void* from, int64_t n, void* to) {
  const auto* source = static_cast<const typename T::Weight*>(from);
  auto* target = static_cast<typename T::Input*>(to);
  for (int64_t i = 0; i < n; i++) narrow(widen(source[i]), target[i]);
  for (int64_t i = n; i % PAD; i++) narrow(0.0f, target[i]);
}

inline float clamped_glu(float gate, float up) {
  gate = gate > 7.0f ? 7.0f : gate;  // so that NaN remains
  up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
  return gate / (1.0f + exp_of(-1.702f * gate)) * (up + 1.0f);
}

template <class T>
void activate(const float* gate, const float* up, int64_t n, int act, void* to) {
  auto* target = static_cast<typename T::Input*>(to);
  if (act == SILU)
    for (int64_t i = 0; i < n; i++) narrow(act_of(gate[i], SILU) * up[i], target[i]);
  else if (act == CLAMPED_GLU)
    for (int64_t i = 0; i < n; i++) narrow(clamped_glu(gate[i], up[i]), target[i]);
  else if (act == GELU_TANH)
    for (int64_t i = 0; i < n; i++) narrow(act_of(gate[i], GELU_TANH) * up[i], target[i]);
  else
    for (int64_t i = 0; i < n; i++) narrow(act_of(gate[i], GELU_ERF) * up[i], target[i]);
}

template <class T>
void store_row(const float* from, int64_t n, void* to) {
  auto* target = static_cast<typename T::Weight*>(to);
  for (int64_t i = 0; i < n; i++) narrow(from[i], target[i]);
}

template <class T>
void widen_row(const void* from, int64_t n, float* to) {
  const auto* source = static_cast<const typename T::Weight*>(from);
  for (int64_t i = 0; i < n; i++) to[i] = widen(source[i]);
}

}  // namespace
}  // namespace scheinfer
