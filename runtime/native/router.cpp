// Routers: logits of a row's experts, those chosen, their weights. What models round between two operators is rounded
// here, too.
//
// Of equally good experts, or groups of them, those that come first are chosen, where torch's topk takes any of them. What
// is not a number is greater than any number, as in torch's topk and max.
#include "router.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "rows.h"

extern "C" {
int scheinfer_linear(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                     int isa, int n_threads);
int scheinfer_linear_wide(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                          int isa, int n_threads);
}

namespace scheinfer {
namespace {

bool is_above(float a, float b) { return a > b || (a != a && b == b); }

// Numbers of the n greatest values, the greatest first.
void take_greatest(const float* values, int64_t n_values, int64_t n, int64_t* chosen) {
  int64_t n_chosen = 0;
  for (int64_t i = 0; i < n_values; i++) {
    int64_t at = n_chosen;
    while (at > 0 && is_above(values[i], values[chosen[at - 1]])) at--;
    if (at == n) continue;
    if (n_chosen < n) n_chosen++;
    for (int64_t j = n_chosen - 1; j > at; j--) chosen[j] = chosen[j - 1];
    chosen[at] = i;
  }
}

void soften(float* values, int64_t n) {
  float top = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < n; i++) top = values[i] > top ? values[i] : top;
  for (int64_t i = 0; i < n; i++) sum += values[i] = expf(values[i] - top);
  for (int64_t i = 0; i < n; i++) values[i] /= sum;
}

// A group is as good as its best expert, or as its two best together.
float score_of(const float* values, int64_t n, bool two) {
  float best = values[0], next = -INFINITY;
  for (int64_t i = 1; i < n; i++) {
    const float v = values[i];
    if (is_above(v, best))
      next = best, best = v;
    else if (is_above(v, next))
      next = v;
  }
  return two ? best + next : best;
}

// Puts `instead` for values of all groups but the best ones. groups: room for a number of each.
void leave_groups(const Layer& l, bool two, float instead, float* values, float* groups) {
  const int64_t n = l.n_experts / l.n_groups;
  for (int64_t g = 0; g < l.n_groups; g++) groups[g] = score_of(values + g * n, n, two);
  for (int64_t g = 0; g < l.n_groups; g++) {
    int64_t n_before = 0;
    for (int64_t other = 0; other < l.n_groups; other++)
      n_before += is_above(groups[other], groups[g]) || (other < g && !is_above(groups[g], groups[other]));
    for (int64_t i = 0; i < n && n_before >= l.top_groups; i++) values[g * n + i] = instead;
  }
}

// Of logits in Scratch::one, here and below.
void choose_by_softmax(const Layer& l, Scratch& s, int64_t* chosen, float* weights) {
  soften(s.one, l.n_experts);
  if (l.n_groups) leave_groups(l, false, 0.0f, s.one, s.wide);
  take_greatest(s.one, l.n_experts, l.top_k, chosen);
  for (int64_t i = 0; i < l.top_k; i++) weights[i] = s.one[chosen[i]];
}

void choose_by_sigmoid(const Layer& l, Scratch& s, int64_t* chosen, float* weights) {
  for (int64_t e = 0; e < l.n_experts; e++) s.one[e] = 1.0f / (1.0f + expf(-s.one[e]));
  for (int64_t e = 0; e < l.n_experts; e++) s.other[e] = s.one[e] + (l.correction ? l.correction[e] : 0.0f);
  if (l.n_groups) leave_groups(l, true, -INFINITY, s.other, s.wide);
  take_greatest(s.other, l.n_experts, l.top_k, chosen);
  for (int64_t i = 0; i < l.top_k; i++) weights[i] = s.one[chosen[i]];
}

void choose_then_soften(const Layer& l, Scratch& s, int64_t* chosen, float* weights) {
  take_greatest(s.one, l.n_experts, l.top_k, chosen);
  for (int64_t i = 0; i < l.top_k; i++) weights[i] = s.one[chosen[i]];
  soften(weights, l.top_k);
}

void round_row(const Kernels* k, float* values, int64_t n, void* room) {
  k->store_row(values, n, room);
  k->widen_row(room, n, values);
}

// The best expert and the best of the others, each with its share of a softmax of those that are not much worse: by at
// most twice the jitter of the greater of the best logit and their own size. room: for a row of logits.
void choose_two(const Layer& l, const Kernels* k, Scratch& s, void* room, int64_t* chosen, float* weights) {
  float reach = float(2.0 * l.jitter);
  round_row(k, &reach, 1, room);
  const float* logits = s.one;
  for (int64_t i = 0; i < 2; i++) {
    const auto is_left = [=](int64_t e) { return i == 0 || e != chosen[0]; };
    int64_t best = -1;
    for (int64_t e = 0; e < l.n_experts; e++)
      if (is_left(e) && (best < 0 || is_above(logits[e], logits[best]))) best = e;
    const float top = logits[best];
    for (int64_t e = 0; e < l.n_experts; e++) s.other[e] = top - logits[e];
    round_row(k, s.other, l.n_experts, room);
    for (int64_t e = 0; e < l.n_experts; e++) s.other[e] /= fabsf(logits[e]) < top ? top : fabsf(logits[e]);
    round_row(k, s.other, l.n_experts, room);
    float sum = 0.0f;
    for (int64_t e = 0; e < l.n_experts; e++)
      if (is_left(e) && !(s.other[e] > reach)) sum += expf(logits[e] - top);
    chosen[i] = best, weights[i] = 1.0f / sum;
  }
}

// A row's experts and their weights. Its logits are gone then.
void choose(const Layer& l, const Kernels* k, char* logits, int64_t* chosen, float* weights) {
  Scratch& s = scratch();
  if (l.wide_logits)
    memcpy(s.one, logits, size_t(l.n_experts) * sizeof(float));
  else
    k->widen_row(logits, l.n_experts, s.one);
  if (l.routing == SPARSE_MIXER) choose_two(l, k, s, logits, chosen, weights);
  if (l.routing == SOFTMAX_OF_CHOSEN) choose_then_soften(l, s, chosen, weights);
  if (l.routing == SIGMOID) choose_by_sigmoid(l, s, chosen, weights);
  if (l.routing == SOFTMAX) choose_by_softmax(l, s, chosen, weights);
  float sum = 0.0f;
  for (int64_t i = 0; i < l.top_k && l.normalises; i++) sum += weights[i];
  if (l.routing == SIGMOID) sum += 1e-20f;
  for (int64_t i = 0; i < l.top_k && l.normalises; i++) weights[i] /= sum;
  for (int64_t i = 0; i < l.top_k; i++) weights[i] *= float(l.scaling);
  if (l.rounds) round_row(k, weights, l.top_k, logits);
}

int64_t word(const void* p) { return reinterpret_cast<int64_t>(p); }

}  // namespace

int route(const Layer& l, const void* x, int64_t S, char* logits, const int64_t* beside, int64_t n_beside,
          int64_t* chosen, float* weights, int n_threads) {
  const int dtype = int(l.dtype), isa = int(l.isa);
  const Kernels* k = kernels(isa, dtype);
  if (!k) return 2;
  const int64_t row_bytes = l.n_experts * (l.wide_logits || dtype == F32 ? 4 : 2);
  std::vector<int64_t> words{word(l.router), word(l.router_bias), word(logits), l.n_experts};
  if (l.wide_logits) {
    if (const int failed = scheinfer_linear_wide(x, S, l.width, 1, words.data(), dtype, isa, n_threads)) return failed;
    words.clear();
  }
  words.insert(words.end(), beside, beside + 4 * n_beside);
  const int64_t n = int64_t(words.size() / 4);
  if (const int failed = n ? scheinfer_linear(x, S, l.width, n, words.data(), dtype, isa, n_threads) : 0) return failed;
  for_rows(n_threads, S, l.n_experts * l.top_k, [&](int64_t s) {
    choose(l, k, logits + s * row_bytes, chosen + s * l.top_k, weights + s * l.top_k);
  });
  return 0;
}

}  // namespace scheinfer

using namespace scheinfer;

// Of rows x [S, width]: chosen and weights [S, top_k]. 0, or 1 without memory, 2 without that instruction set.
extern "C" int scheinfer_route(const Layer* layer, const void* x, int64_t S, int64_t* chosen, float* weights,
                               int n_threads) {
  static thread_local Aligned memory;
  try {
    char* logits = memory.at_least(size_t(S * layer->n_experts) * sizeof(float));
    return route(*layer, x, S, logits, nullptr, 0, chosen, weights, n_threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
