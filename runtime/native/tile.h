// The arithmetic, compiled once per instruction set: each includes this file with its own vectors.
//
// A tile is ROWS rows of W times up to T::TOKENS tokens, all sums in registers, both sides read along K, so nothing
// has to be packed. Every sum runs through K in one fixed order, in blocks of T::BLOCK: results depend neither on the
// number of threads nor on what other tokens are in the batch.
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

// T: Weight, Input (element types), W (vector of weights), X, Sum (vectors), STEP elements per vector, BLOCK of K, TOKENS
template <class T, int R, int M, bool PREFETCH>
void tile(const typename T::Weight* w, int64_t stride, int64_t n, const typename T::Input* const* x, int64_t k0,
          float* out, int64_t out_stride) {
  typename T::Sum sum[M][R];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[m][r] = T::zero();
  const typename T::Input* rows[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) rows[m] = x[m] + k0;
  int64_t k = 0;
  for (; k + T::STEP <= n; k += T::STEP) {
    typename T::W wv[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      wv[r] = T::load_weights(w + r * stride + k);
      if (PREFETCH) __builtin_prefetch(w + (r + R) * stride + k, 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename T::X xv = T::load_input(rows[m] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[m][r] = T::add(sum[m][r], wv[r], xv);
    }
  }
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
  for (int m = 0; m < M; m++) {
    float total[R];
    T::template totals<R>(sum[m], total);
    for (int r = 0; r < R; r++) out[m * out_stride + r] = k0 ? out[m * out_stride + r] + total[r] : total[r];
  }
}

template <class T, int R, int M>
void tiles(const typename T::Weight* w, int64_t stride, int64_t n, const typename T::Input* const* x, int64_t tokens,
           int64_t k0, float* out, int64_t out_stride, bool prefetch) {
  if (tokens >= M) {
    int64_t t = 0;
    for (; t + M <= tokens; t += M, prefetch = false) {
      if (prefetch)
        tile<T, R, M, true>(w, stride, n, x + t, k0, out + t * out_stride, out_stride);
      else
        tile<T, R, M, false>(w, stride, n, x + t, k0, out + t * out_stride, out_stride);
    }
    x += t, out += t * out_stride, tokens -= t;
  }
  if constexpr (M > 1)
    if (tokens) tiles<T, R, M - 1>(w, stride, n, x, tokens, k0, out, out_stride, prefetch);
}

// One group of rows, one block of K, all tokens. Weights that arithmetic cannot take are widened once for many tokens.
template <class T>
void group(const typename T::Weight* w, int64_t rows, int64_t K, int64_t k0, const typename T::Input* const* x,
           int64_t tokens, float* out, int64_t out_stride, float* scratch, bool prefetch) {
  const int64_t n = K - k0 < T::BLOCK ? K - k0 : T::BLOCK;
  w += k0;
  if (rows < ROWS) {
    for (int64_t r = 0; r < rows; r++)
      tiles<T, 1, T::TOKENS>(w + r * K, K, n, x, tokens, k0, out + r, out_stride, false);
  } else if (sizeof(typename T::Weight) < sizeof(typename T::Input) && tokens > 2 * T::TOKENS) {
    for (int64_t r = 0; r < ROWS; r++)
      for (int64_t k = 0; k < n; k++) scratch[r * T::BLOCK + k] = widen(w[r * K + k]);
    tiles<typename T::Widened, ROWS, T::TOKENS>(reinterpret_cast<const typename T::Widened::Weight*>(scratch), T::BLOCK,
                                               n, reinterpret_cast<const typename T::Widened::Input* const*>(x), tokens,
                                               k0, out, out_stride, false);
  } else {
    tiles<T, ROWS, T::TOKENS>(w, K, n, x, tokens, k0, out, out_stride, prefetch);
  }
}

template <class T>
void dots(const void* weights, int64_t rows, int64_t K, const void* const* inputs, int64_t tokens, float* out,
          int64_t out_stride, float* scratch) {
  const auto* w = static_cast<const typename T::Weight*>(weights);
  const auto* x = reinterpret_cast<const typename T::Input* const*>(inputs);
  const auto left = [rows](int64_t r) { return rows - r < ROWS ? rows - r : int64_t(ROWS); };
  if (tokens <= 4 * T::TOKENS) {  // W comes from memory: along its rows
    for (int64_t r = 0; r < rows; r += ROWS)
      for (int64_t k0 = 0; k0 < K; k0 += T::BLOCK)
        group<T>(w + r * K, left(r), K, k0, x, tokens, out + r, out_stride, scratch, r + 2 * ROWS <= rows);
    return;
  }
  for (int64_t k0 = 0; k0 < K; k0 += T::BLOCK)  // a block of x stays in the second cache
    for (int64_t r = 0; r < rows; r += ROWS)
      group<T>(w + r * K, left(r), K, k0, x, tokens, out + r, out_stride, scratch, false);
}

// -- rows ------------------------------------------------------------------------------------------------------------

template <class T>
void load_row(const void* from, int64_t n, void* to) {
  const auto* source = static_cast<const typename T::Weight*>(from);
  auto* target = static_cast<typename T::Input*>(to);
  for (int64_t i = 0; i < n; i++) narrow(widen(source[i]), target[i]);
  for (int64_t i = n; i % PAD; i++) narrow(0.0f, target[i]);
}

template <class T>
void activate(const float* gate, const float* up, int64_t n, int act, void* to) {
  auto* target = static_cast<typename T::Input*>(to);
  if (act == SILU)
    for (int64_t i = 0; i < n; i++) narrow(act_of(gate[i], SILU) * up[i], target[i]);
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
const Kernels* kernels_of() {
  static const Kernels found = {dots<T>, load_row<T>, activate<T>, store_row<T>, int(sizeof(typename T::Input))};
  return &found;
}

}  // namespace
}  // namespace scheinfer
