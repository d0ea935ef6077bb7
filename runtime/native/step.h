// Rows of a step of few tokens, compiled once per instruction set as tile.h is: norms, rotations, attention's past.
#pragma once

#include "tile.h"

namespace scheinfer {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

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

// One query over n keys and values: mixed = sum of exp(score - top) * value, sum and top beside it.
template <class Element>
void attend_row(const float* query, const void* keys, const void* values, int64_t n, const Past& past, float* mixed,
                float* top_and_sum) {
  const auto *k = static_cast<const Element*>(keys), *v = static_cast<const Element*>(values);
  float scores[PAST_AT_ONCE], top = -INFINITY, sum = 0.0f;
  for (int64_t t = 0; t < n; t++) {
    scores[t] = dot(query, k + t * past.key_stride, past.key_width) * past.scale;
    top = scores[t] > top ? scores[t] : top;
  }
  for (int64_t t = 0; t < n; t++) scores[t] = exp_of(scores[t] - top);
  for (int64_t t = 0; t < n; t++) sum += scores[t];
  int64_t d = 0;
  constexpr int64_t SUMS = 4;  // each waits for its own last addition alone
  for (; d + SUMS * LANES <= past.value_width; d += SUMS * LANES) {
    Lanes part[SUMS] = {};
    for (int64_t t = 0; t < n; t++)
      for (int64_t i = 0; i < SUMS; i++) part[i] += scores[t] * lanes_of(v + t * past.value_stride + d + i * LANES);
    memcpy(mixed + d, part, sizeof(part));
  }
  for (; d + LANES <= past.value_width; d += LANES) {
    Lanes part = {};
    for (int64_t t = 0; t < n; t++) part += scores[t] * lanes_of(v + t * past.value_stride + d);
    memcpy(mixed + d, &part, sizeof(part));
  }
  for (; d < past.value_width; d++) {
    mixed[d] = 0.0f;
    for (int64_t t = 0; t < n; t++) mixed[d] += scores[t] * widen(v[t * past.value_stride + d]);
  }
  top_and_sum[0] = top, top_and_sum[1] = sum;
}

template <class T>
const Kernels* kernels_of() {
  static const Kernels found = {dots<T>, load_row<T>, activate<T>, store_row<T>, widen_row<T>, norm_row<typename T::Weight>,
                                add_row<typename T::Weight>, turn_row<typename T::Weight>, attend_row<typename T::Weight>,
                                int(sizeof(typename T::Input))};
  return &found;
}

}  // namespace
}  // namespace scheinfer
