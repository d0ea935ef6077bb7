// A decoder layer in one call, for one new token of each of few sequences:
//
//   h = x + output(attend(turned(query(norm(x))), past and turned(key(norm(x))), value(norm(x))))
//   y = h + experts chosen by router(norm(h)) [+ sigmoid(weight . norm(h)) * shared expert]
//
// The parts are the calls that compute them one by one, so results are the same; every value between two of them is
// rounded to the weights' dtype, as the models' own code does.
#include <time.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "layer.h"
#include "rows.h"

extern "C" {
int scheinfer_linear(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                     int isa, int n_threads);
int scheinfer_mlp(const void* x, void* y, int64_t S, int64_t D, int dtype, int act, int isa, int n_threads,
                  int64_t n_experts, const int64_t* experts);
int scheinfer_norm(const void* x, const void* weight, void* y, int64_t S, int64_t D, double eps, int dtype, int isa,
                   int n_threads);
int scheinfer_turn(void* x, const void* cosine, const void* sine, int64_t S, int64_t heads, int64_t D,
                   int64_t table_stride, int dtype, int isa, int n_threads);
int scheinfer_attend(const void* query, const void* key, const void* value, void* out, const int64_t* shape,
                     double scale, int dtype, int isa, int n_threads);
}

namespace scheinfer {
namespace {

struct Failed {
  int code;
};

void check(int code) {
  if (code) throw Failed{code};
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

int64_t word(const void* p) { return reinterpret_cast<int64_t>(p); }

struct Call {
  const Layer& l;
  const Kernels* k;
  int n_threads;
  int64_t S, bytes;
  int dtype, isa;
  char *query = nullptr, *key = nullptr, *value = nullptr, *mixed = nullptr;
  char *part = nullptr, *hidden = nullptr, *normed = nullptr, *shared = nullptr;  // rows of the model's width
  char *logits = nullptr, *gate = nullptr;
  float *one = nullptr, *other = nullptr;  // a row each

  void norm(const void* x, const void* weight, double eps, void* to) const {
    check(scheinfer_norm(x, weight, to, S, l.width, eps, dtype, isa, 1));
  }
  void project(const void* x, int64_t K, const std::vector<int64_t>& words) const {
    check(scheinfer_linear(x, S, K, int64_t(words.size() / 4), words.data(), dtype, isa, n_threads));
  }
  void mlp(void* y, int64_t n_experts, const std::vector<int64_t>& words) const {
    check(scheinfer_mlp(normed, y, S, l.width, dtype, int(l.act), isa, n_threads, n_experts, words.data()));
  }
  // to = a + b, rows of the model's width.
  void add(const void* a, const void* b, void* to) const {
    for (int64_t s = 0; s < S; s++) {
      const int64_t at = s * l.width * bytes;
      k->widen_row(static_cast<const char*>(a) + at, l.width, one);
      k->widen_row(static_cast<const char*>(b) + at, l.width, other);
      for (int64_t i = 0; i < l.width; i++) one[i] += other[i];
      k->store_row(one, l.width, static_cast<char*>(to) + at);
    }
  }
};

// -- attention -------------------------------------------------------------------------------------------------------

void clip(const Call& call, char* x, int64_t n) {
  if (std::isinf(call.l.clip)) return;
  const float most = float(call.l.clip);
  for (int64_t s = 0; s < call.S; s++, x += n * call.bytes) {
    call.k->widen_row(x, n, call.one);
    for (int64_t i = 0; i < n; i++) call.one[i] = call.one[i] > most ? most : call.one[i] < -most ? -most : call.one[i];
    call.k->store_row(call.one, n, x);
  }
}

// Norms of heads, if there are any, and rotation.
void place(const Call& call, char* x, const void* weight, int64_t heads) {
  const Layer& l = call.l;
  const int64_t n = heads * l.head_width;
  if (weight) {
    const int64_t rows = l.norms_whole ? call.S : call.S * heads, width = l.norms_whole ? n : l.head_width;
    check(scheinfer_norm(x, weight, x, rows, width, l.head_eps, call.dtype, call.isa, 1));
  }
  clip(call, x, n);
  check(scheinfer_turn(x, l.cosine, l.sine, call.S, heads, l.head_width, l.table_stride, call.dtype, call.isa, 1));
}

void append(const Call& call, const char* from, void* buffer, const int64_t* strides) {
  const Layer& l = call.l;
  const int64_t size = l.head_width * call.bytes;
  for (int64_t i = 0; i < call.S * l.n_kv_heads; i++) {
    const int64_t at = i / l.n_kv_heads * strides[0] + i % l.n_kv_heads * strides[1] + l.n_past * strides[2];
    memcpy(static_cast<char*>(buffer) + at * call.bytes, from + i * size, size_t(size));
  }
}

void attention(const Call& call) {
  const Layer& l = call.l;
  const int64_t n_query = l.n_heads * l.head_width, n_key = l.n_kv_heads * l.head_width;
  call.norm(l.x, l.input_norm, l.input_eps, call.normed);
  call.project(call.normed, l.width,
               {word(l.query), word(l.query_bias), word(call.query), n_query, word(l.key), word(l.key_bias),
                word(call.key), n_key, word(l.value), word(l.value_bias), word(call.value), n_key});
  place(call, call.query, l.query_norm, l.n_heads);
  place(call, call.key, l.key_norm, l.n_kv_heads);
  clip(call, call.value, n_key);
  append(call, call.key, l.keys, l.key_strides);
  append(call, call.value, l.values, l.value_strides);
  const int64_t *at = l.key_strides, *value_at = l.value_strides;
  const int64_t shape[] = {call.S, l.n_kv_heads, l.n_heads / l.n_kv_heads, l.n_past + 1, l.head_width, l.head_width,
                           at[0], at[1], at[2], value_at[0], value_at[1], value_at[2]};
  check(scheinfer_attend(call.query, l.keys, l.values, call.mixed, shape, l.scale, call.dtype, call.isa,
                         call.n_threads));
  call.project(call.mixed, n_query, {word(l.output), word(l.output_bias), word(call.part), l.width});
  call.add(l.x, call.part, call.hidden);
}

// -- experts ---------------------------------------------------------------------------------------------------------

struct Choice {
  std::vector<std::vector<int64_t>> rows;    // by expert
  std::vector<std::vector<float>> weights;
};

// The top_k likeliest experts of a row; of equally likely ones those that come first.
void choose(const Call& call, int64_t s, Choice& choice) {
  const Layer& l = call.l;
  std::vector<float> chance(size_t(l.n_experts)), weights;
  call.k->widen_row(call.logits + s * l.n_experts * call.bytes, l.n_experts, chance.data());
  float top = -INFINITY, sum = 0.0f, kept = 0.0f;
  for (float v : chance) top = v > top ? v : top;
  for (float& v : chance) sum += v = expf(v - top);
  for (float& v : chance) v /= sum;
  std::vector<int64_t> chosen;
  std::vector<bool> taken(size_t(l.n_experts), false);
  for (int64_t i = 0; i < l.top_k; i++) {
    int64_t best = -1;
    for (int64_t e = 0; e < l.n_experts; e++)
      if (!taken[size_t(e)] && (best < 0 || chance[size_t(e)] > chance[size_t(best)])) best = e;
    taken[size_t(best)] = true;
    chosen.push_back(best);
    weights.push_back(chance[size_t(best)]);
    kept += weights.back();
  }
  if (l.normalises)
    for (float& v : weights) v /= kept;
  if (l.rounds) {
    call.k->store_row(weights.data(), l.top_k, call.gate);
    call.k->widen_row(call.gate, l.top_k, weights.data());
  }
  for (size_t i = 0; i < chosen.size(); i++) {
    choice.rows[size_t(chosen[i])].push_back(s);
    choice.weights[size_t(chosen[i])].push_back(weights[i]);
  }
}

Choice route(const Call& call) {
  const Layer& l = call.l;
  Choice choice{std::vector<std::vector<int64_t>>(size_t(l.n_experts)),
                std::vector<std::vector<float>>(size_t(l.n_experts))};
  std::vector<int64_t> words{word(l.router), 0, word(call.logits), l.n_experts};
  if (l.shared_weight) words.insert(words.end(), {word(l.shared_weight), 0, word(call.gate), 1});
  call.project(call.normed, l.width, words);
  for (int64_t s = 0; s < call.S && l.shared_weight; s++)
    call.k->widen_row(call.gate + s * call.bytes, 1, call.other + s);
  for (int64_t s = 0; s < call.S; s++) choose(call, s, choice);
  return choice;
}

// shared = sigmoid(gate) * expert(normed); the gates lie in `other`.
void share(const Call& call) {
  const Layer& l = call.l;
  std::vector<float> gates(call.other, call.other + call.S);
  call.mlp(call.shared, 1, {0, 0, call.S, 1, word(l.shared_gate), word(l.shared_up), word(l.shared_down),
                            l.shared_columns});
  for (float& v : gates) v = 1.0f / (1.0f + expf(-v));
  call.k->store_row(gates.data(), call.S, call.gate);
  call.k->widen_row(call.gate, call.S, gates.data());
  for (int64_t s = 0; s < call.S; s++) {
    char* row = call.shared + s * l.width * call.bytes;
    call.k->widen_row(row, l.width, call.one);
    for (int64_t i = 0; i < l.width; i++) call.one[i] *= gates[size_t(s)];
    call.k->store_row(call.one, l.width, row);
  }
}

void experts(const Call& call, const Choice& choice) {
  const Layer& l = call.l;
  std::vector<int64_t> words;
  int64_t n = 0;
  for (int64_t e = 0; e < l.n_experts; e++) {
    const int64_t n_rows = l.router ? int64_t(choice.rows[size_t(e)].size()) : call.S;
    l.counts[e] = n_rows;
    if (!n_rows) continue;
    const int64_t* pieces = l.experts + e * 4 * l.n_pieces;
    if (l.router) words.insert(words.end(), {word(choice.rows[size_t(e)].data()), word(choice.weights[size_t(e)].data())});
    else words.insert(words.end(), {0, 0});
    words.insert(words.end(), {n_rows, l.n_pieces});
    words.insert(words.end(), pieces, pieces + 4 * l.n_pieces);
    n++;
  }
  call.mlp(call.part, n, words);
  if (l.shared_weight) call.add(call.part, call.shared, call.part);
  call.add(call.hidden, call.part, l.y);
}

// -- all of it -------------------------------------------------------------------------------------------------------

size_t lay_out(Call& call, char* memory) {
  const Layer& l = call.l;
  const int64_t n_query = l.n_heads * l.head_width, n_key = l.n_kv_heads * l.head_width, S = call.S;
  int64_t at = 0, row = n_query > l.width ? n_query : l.width;
  const auto next = [&](int64_t n, int64_t bytes) {
    char* here = memory + at;
    at += up_to(n * bytes, 64);
    return here;
  };
  char** const wide[] = {&call.part, &call.hidden, &call.normed, &call.shared};
  for (char** p : wide) *p = next(S * l.width, call.bytes);
  call.query = next(S * n_query, call.bytes), call.mixed = next(S * n_query, call.bytes);
  call.key = next(S * n_key, call.bytes), call.value = next(S * n_key, call.bytes);
  call.logits = next(S * l.n_experts, call.bytes), call.gate = next(S + l.top_k, call.bytes);
  row = row > S + n_key ? row : S + n_key;
  call.one = reinterpret_cast<float*>(next(row, 4)), call.other = reinterpret_cast<float*>(next(row, 4));
  return size_t(at);
}

void compute(const Call& call, Layer& l) {
  l.times[0] = now_ns();
  attention(call);
  call.norm(call.hidden, l.post_norm, l.post_eps, call.normed);
  const Choice choice = l.router ? route(call) : Choice{};
  if (l.shared_weight) share(call);
  l.times[1] = now_ns();
  experts(call, choice);
  l.times[2] = now_ns();
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

extern "C" {

// 0, or 1 without memory, 2 without that instruction set. Nothing but y, the new tokens' place in the cache, counts and
// times is written; y may be x.
int scheinfer_layer(Layer* layer, int n_threads) {
  static thread_local Aligned memory;
  try {
    const int dtype = int(layer->dtype), isa = int(layer->isa);
    const Kernels* k = kernels(isa, dtype);
    if (!k) return 2;
    Call call{*layer, k, n_threads, layer->rows, dtype == F32 ? 4 : 2, dtype, isa};
    char* const room = memory.at_least(lay_out(call, nullptr));
    lay_out(call, room);
    compute(call, *layer);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const Failed& failed) {
    return failed.code;
  }
}

// The same of all layers; what it returns goes for the layer after the n_done that were computed.
int scheinfer_layers(Layers* all, int n_threads) {
  for (all->n_done = 0; all->n_done < all->n_layers; all->n_done++) {
    Layer& l = *all->layers[all->n_done];
    l.rows = all->rows, l.n_past = all->n_past, l.x = all->n_done ? all->y : all->x, l.y = all->y;
    l.cosine = all->cosine, l.sine = all->sine, l.table_stride = all->table_stride;
    if (const int failed = scheinfer_layer(&l, n_threads)) return failed;
  }
  const Layer& last = *all->layers[all->n_layers - 1];
  return scheinfer_norm(all->y, all->norm, all->y, all->rows, last.width, all->eps, int(last.dtype), int(last.isa), 1);
}
}
