// Rows of a step of few tokens, compiled once per instruction set as tile.h is: norms, rotations, attention's past.
#pragma once

#include <type_traits>

#include "tile.h"

namespace scheinfer {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

inline Lanes lanes_of(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <class Element>
inline Lanes lanes_of(const Element* p) {
  float wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = widen(p[i]);
  Lanes v;
  memcpy(&v, wide, sizeof(v));
  return v;
}

inline Lanes lanes_of(const Bf16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(32)));
  typedef uint32_t Wide __attribute__((vector_size(64)));
  Narrow raw;
  memcpy(&raw, p, sizeof(raw));
  return bits<Lanes>(__builtin_convertvector(raw, Wide) << 16);
}

// The first n of LANES, then zeros.
template <class Element>
inline Lanes first_lanes_of(const Element* p, int64_t n) {
  Element some[LANES] = {};
  memcpy(some, p, size_t(n) * sizeof(Element));
  return lanes_of(some);
}

inline float total(Lanes v) {  // halves of vectors, not one lane after the other
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half half[2];
  memcpy(half, &v, sizeof(half));
  half[0] += half[1];
  Quarter quarter[2];
  memcpy(quarter, half, sizeof(quarter));
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

template <class Left, class Right>
float dot(const Left* a, const Right* b, int64_t n) {
  Lanes sum = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += lanes_of(a + i) * lanes_of(b + i);
  float out = total(sum);
  for (; i < n; i++) out += widen(a[i]) * widen(b[i]);
  return out;
}

// to = weight * (x / sqrt(mean of squares + eps)), rounded before the weight, too, as the models' own code does.
template <class Element>
void norm_row(const void* from, const void* weight, int64_t n, float eps, void* to) {
  const auto *x = static_cast<const Element*>(from), *w = static_cast<const Element*>(weight);
  auto* y = static_cast<Element*>(to);
  const float scale = 1.0f / sqrtf(dot(x, x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; i++) {
    Element rounded;
    narrow(widen(x[i]) * scale, rounded);
    narrow(widen(w[i]) * widen(rounded), y[i]);
  }
}

// to = weight * (x - mean) / sqrt(variance + eps) + bias, rounded once, as torch's layer_norm does.
template <class Element>
void layer_norm_row(const void* from, const void* weight, const void* bias, int64_t n, float eps, void* to) {
  const auto *x = static_cast<const Element*>(from), *w = static_cast<const Element*>(weight);
  const auto* b = static_cast<const Element*>(bias);
  auto* y = static_cast<Element*>(to);
  const int64_t whole = n / LANES * LANES;
  Lanes sums = {}, squares = {};
  for (int64_t i = 0; i < whole; i += LANES) sums += lanes_of(x + i);
  float mean = total(sums);
  for (int64_t i = whole; i < n; i++) mean += widen(x[i]);
  mean /= float(n);
  for (int64_t i = 0; i < whole; i += LANES) squares += (lanes_of(x + i) - mean) * (lanes_of(x + i) - mean);
  float square = total(squares);
  for (int64_t i = whole; i < n; i++) square += (widen(x[i]) - mean) * (widen(x[i]) - mean);
  const float scale = 1.0f / sqrtf(square / float(n) + eps);
  for (int64_t i = 0; i < n; i++) narrow((widen(x[i]) - mean) * scale * widen(w[i]) + widen(b[i]), y[i]);
}

// to = one + other, rounded once.
template <class Element>
void add_row(const void* one, const void* other, int64_t n, void* to) {
  const auto *a = static_cast<const Element*>(one), *b = static_cast<const Element*>(other);
  auto* sum = static_cast<Element*>(to);
  for (int64_t i = 0; i < n; i++) narrow(widen(a[i]) + widen(b[i]), sum[i]);
}

template <class Element>
inline float rounded(float v) {
  Element e;
  narrow(v, e);
  return widen(e);
}

// Turns pairs (i, i + n / 2) of n values by the angles whose cosine and sine are given; products and their sum are
// rounded, as the models' own code does.
template <class Element>
void turn_row(void* values, const void* cosine, const void* sine, int64_t n) {
  auto* x = static_cast<Element*>(values);
  const auto *c = static_cast<const Element*>(cosine), *s = static_cast<const Element*>(sine);
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    narrow(rounded<Element>(a * widen(c[i])) - rounded<Element>(b * widen(s[i])), x[i]);
    narrow(rounded<Element>(b * widen(c[i + half])) + rounded<Element>(a * widen(s[i + half])), x[i + half]);
  }
}

#ifdef __AVX512F__
constexpr int TOGETHER = 4;  // queries whose sums fit into registers
#else
constexpr int TOGETHER = 2;
#endif

// Q queries' scores of n keys: each key is read once.
template <class Element, int Q>
void score_keys(const float* const* queries, const Element* keys, int64_t from, int64_t n, const Past& past,
                float (*scores)[PAST_AT_ONCE]) {
  const int64_t whole = past.key_width / LANES * LANES, rest = past.key_width - whole;
  for (int64_t t = from; t < n; t++) {
    const Element* k = keys + t * past.key_stride;
    Lanes sum[Q] = {};
    for (int64_t i = 0; i < whole; i += LANES) {
      const Lanes lanes = lanes_of(k + i);
      for (int q = 0; q < Q; q++) sum[q] += lanes_of(queries[q] + i) * lanes;
    }
    if (rest) {
      const Lanes lanes = first_lanes_of(k + whole, rest);
      for (int q = 0; q < Q; q++) sum[q] += first_lanes_of(queries[q] + whole, rest) * lanes;
    }
    for (int q = 0; q < Q; q++) scores[q][t] = total(sum[q]) * past.scale;
  }
}

// mixed[q] = or, of later keys, += sum over keys of score * value; each value is read once.
template <class Element, int Q>
void mix_values(const float (*scores)[PAST_AT_ONCE], const Element* values, int64_t from, int64_t n, const Past& past,
                float* const* mixed) {
  constexpr int64_t SUMS = 2 * TOGETHER / Q;  // each waits for its own last addition alone
  const auto some = [&](auto sums, int64_t d) {
    constexpr int64_t N = decltype(sums)::value;
    Lanes part[Q][N] = {};
    for (int q = 0; q < Q && from; q++) memcpy(part[q], mixed[q] + d, sizeof(part[q]));
    for (int64_t t = from; t < n; t++)
      for (int64_t i = 0; i < N; i++) {
        const Lanes lanes = lanes_of(values + t * past.value_stride + d + i * LANES);
        for (int q = 0; q < Q; q++) part[q][i] += scores[q][t] * lanes;
      }
    for (int q = 0; q < Q; q++) memcpy(mixed[q] + d, part[q], sizeof(part[q]));
  };
  int64_t d = 0;
  for (; d + SUMS * LANES <= past.value_width; d += SUMS * LANES) some(std::integral_constant<int64_t, SUMS>(), d);
  for (; d + LANES <= past.value_width; d += LANES) some(std::integral_constant<int64_t, 1>(), d);
  if (const int64_t rest = past.value_width - d)
    for (int q = 0; q < Q; q++) {
      Lanes part = from ? first_lanes_of(mixed[q] + d, rest) : Lanes{};
      for (int64_t t = from; t < n; t++) part += scores[q][t] * first_lanes_of(values + t * past.value_stride + d, rest);
      memcpy(mixed[q] + d, &part, size_t(rest) * sizeof(float));
    }
}

// Powers of n scores relative to the highest of them; that and their sum.
inline void soften_scores(float* scores, int64_t n, float* top_and_sum) {
  const int64_t whole = n / LANES * LANES;
  float tops[LANES], top = -INFINITY;
  for (float& v : tops) v = -INFINITY;
  for (int64_t t = 0; t < whole; t += LANES)
    for (int64_t i = 0; i < LANES; i++) tops[i] = scores[t + i] > tops[i] ? scores[t + i] : tops[i];
  for (const float v : tops) top = v > top ? v : top;
  for (int64_t t = whole; t < n; t++) top = scores[t] > top ? scores[t] : top;
  for (int64_t t = 0; t < n; t++) scores[t] = exp_of(scores[t] - top);
  Lanes sums = {};
  for (int64_t t = 0; t < whole; t += LANES) sums += lanes_of(scores + t);
  float sum = total(sums);
  for (int64_t t = whole; t < n; t++) sum += scores[t];
  top_and_sum[0] = top, top_and_sum[1] = sum;
}

// Q queries; what all of them see together, then what each sees alone: a row's sums are the same beside any others.
template <class Element, int Q>
void attend_together(const Seeing* rows, const Element* keys, const Element* values, const Past& past) {
  float scores[Q][PAST_AT_ONCE];
  const float* queries[Q];
  float* mixed[Q];
  int64_t common = rows[0].n;
  for (int q = 0; q < Q; q++) {
    queries[q] = rows[q].query, mixed[q] = rows[q].mixed;
    common = rows[q].n < common ? rows[q].n : common;
  }
  score_keys<Element, Q>(queries, keys, 0, common, past, scores);
  for (int q = 0; q < Q; q++) {
    score_keys<Element, 1>(queries + q, keys, common, rows[q].n, past, scores + q);
    soften_scores(scores[q], rows[q].n, rows[q].top_and_sum);
  }
  mix_values<Element, Q>(scores, values, 0, common, past, mixed);
  for (int q = 0; q < Q; q++)
    if (rows[q].n > common) mix_values<Element, 1>(scores + q, values, common, rows[q].n, past, mixed + q);
}

// Queries over keys and values of which each sees as many as it says.
template <class Element>
void attend_few(const Seeing* rows, int64_t n_rows, const void* keys, const void* values, const Past& past) {
  const auto *k = static_cast<const Element*>(keys), *v = static_cast<const Element*>(values);
  int64_t i = 0;
  for (; i + TOGETHER <= n_rows; i += TOGETHER) attend_together<Element, TOGETHER>(rows + i, k, v, past);
  for (; TOGETHER > 2 && i + 2 <= n_rows; i += 2) attend_together<Element, 2>(rows + i, k, v, past);
  for (; i < n_rows; i++) attend_together<Element, 1>(rows + i, k, v, past);
}

// sum += N weighted rows, each element's terms in the rows' order.
template <class Element, int N>
void add_weighted(const Element* rows, int64_t K, const float* weights, float* sum) {
  int64_t d = 0;
  for (; d + LANES <= K; d += LANES) {
    Lanes part = lanes_of(sum + d);
    for (int i = 0; i < N; i++) part += weights[i] * lanes_of(rows + i * K + d);
    memcpy(sum + d, &part, sizeof(part));
  }
  for (; d < K; d++)
    for (int i = 0; i < N; i++) sum[d] += weights[i] * widen(rows[i * K + d]);
}

template <class Element>
void weigh_rows(const void* w, int64_t n, int64_t K, const float* weights, float* sum) {
  constexpr int AT_ONCE = 8;
  const auto* rows = static_cast<const Element*>(w);
  memset(sum, 0, size_t(K) * sizeof(float));
  int64_t r = 0;
  for (; r + AT_ONCE <= n; r += AT_ONCE) add_weighted<Element, AT_ONCE>(rows + r * K, K, weights + r, sum);
  for (; r < n; r++) add_weighted<Element, 1>(rows + r * K, K, weights + r, sum);
}

template <class T>
const Kernels* kernels_of() {
  using Weight = typename T::Weight;
  static const Kernels found = {dots<T>, load_row<T>, activate<T>, store_row<T>, widen_row<T>, norm_row<Weight>,
                                layer_norm_row<Weight>, add_row<Weight>, turn_row<Weight>, attend_few<Weight>,
                                weigh_rows<Weight>, int(sizeof(typename T::Input))};
  return &found;
}

}  // namespace
}  // namespace scheinfer
