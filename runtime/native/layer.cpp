// A decoder layer in one call, for one new token of each of few sequences or for prompts:
//
//   h = x + output(attend(turned(query(norm(x))), past and turned(key(norm(x))), value(norm(x))))
//   y = h + experts chosen by router(norm(h)) [+ [sigmoid(weight . norm(h)) *] shared expert]
//
// The parts are the calls that compute them one by one, so results are the same; every value between two of them is
// rounded to the weights' dtype, as the models' own code does.
#include <time.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "layer.h"
#include "router.h"
#include "rows.h"

extern "C" {
int scheinfer_linear(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                     int isa, int n_threads);
int scheinfer_mlp(const void* x, void* y, int64_t S, int64_t D, int dtype, int act, int isa, int n_threads,
                  int64_t n_experts, const int64_t* experts);
int scheinfer_norm(const void* x, const void* weight, void* y, int64_t S, int64_t D, double eps, int dtype, int isa,
                   int n_threads);
int scheinfer_layer_norm(const void* x, const void* weight, const void* bias, void* y, int64_t S, int64_t D, double eps,
                         int dtype, int isa, int n_threads);
int scheinfer_add(const void* one, const void* other, void* y, int64_t S, int64_t D, int dtype, int isa, int n_threads);
int scheinfer_turn(void* x, const void* cosine, const void* sine, int64_t S, int64_t heads, int64_t D,
                   int64_t table_stride, int dtype, int isa, int n_threads);
int scheinfer_latent(const scheinfer::Layer* layer, void* out, int n_threads);
int scheinfer_attend(const void* query, const void* key, const void* value, void* out, const int64_t* shape,
                     double scale, const void* sinks, int dtype, int isa, int n_threads);
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

  void norm(const void* x, const void* weight, const void* bias, double eps, void* to) const {
    if (l.norms_once) return norm_once(x, weight, eps, to);
    check(bias ? scheinfer_layer_norm(x, weight, bias, to, S, l.width, eps, dtype, isa, n_threads)
               : scheinfer_norm(x, weight, to, S, l.width, eps, dtype, isa, n_threads));
  }
  void norm_once(const void* x, const void* weight, double eps, void* to) const {
    for_rows(n_threads, S, l.width, [=, this](int64_t s) {
      const int64_t at = s * l.width * bytes;
      k->norm_row_once(static_cast<const char*>(x) + at, weight, l.width, float(eps), static_cast<char*>(to) + at);
    });
  }
  void project(const void* x, int64_t K, const std::vector<int64_t>& words) const {
    check(scheinfer_linear(x, S, K, int64_t(words.size() / 4), words.data(), dtype, isa, n_threads));
  }
  void mlp(void* y, int64_t n_experts, const std::vector<int64_t>& words) const {
    check(scheinfer_mlp(normed, y, S, l.width, dtype, int(l.act), isa, n_threads, n_experts, words.data()));
  }
  // to = a + b, rows of the model's width.
  void add(const void* a, const void* b, void* to) const {
    check(scheinfer_add(a, b, to, S, l.width, dtype, isa, n_threads));
  }
  // hidden = x + part, normed = what the norm before the MLP makes of it, row by row.
  void add_and_norm() const {
    for_rows(n_threads, S, l.width, [this](int64_t s) {
      const int64_t at = s * l.width * bytes;
      k->add_row(static_cast<const char*>(l.x) + at, part + at, l.width, hidden + at);
      if (l.post_norm_bias)
        k->layer_norm_row(hidden + at, l.post_norm, l.post_norm_bias, l.width, float(l.post_eps), normed + at);
      else
        (l.norms_once ? k->norm_row_once : k->norm_row)(hidden + at, l.post_norm, l.width, float(l.post_eps), normed + at);
    });
  }
};

// -- attention -------------------------------------------------------------------------------------------------------

// Rows of n numbers as change(numbers, how many, row) leaves them, some at a time in float32.
template <class Change>
void alter(const Call& call, char* x, int64_t n, const Change& change) {
  for_rows(call.n_threads, call.S, n, [&](int64_t s) {
    constexpr int64_t AT_ONCE = 512;
    float some[AT_ONCE];
    for (int64_t d = 0; d < n; d += AT_ONCE) {
      char* const at = x + (s * n + d) * call.bytes;
      const int64_t now = n - d < AT_ONCE ? n - d : AT_ONCE;
      call.k->widen_row(at, now, some);
      change(some, now, s);
      call.k->store_row(some, now, at);
    }
  });
}

void clip(const Call& call, char* x, int64_t n) {
  if (std::isinf(call.l.clip)) return;
  const float most = float(call.l.clip);
  alter(call, x, n, [=](float* v, int64_t n, int64_t) {
    for (int64_t i = 0; i < n; i++) v[i] = v[i] > most ? most : v[i] < -most ? -most : v[i];
  });
}

// Norms of heads, if there are any, and rotation.
void place(const Call& call, char* x, const void* weight, int64_t heads) {
  const Layer& l = call.l;
  const int64_t n = heads * l.head_width;
  if (weight) {
    const int64_t rows = l.norms_whole ? call.S : call.S * heads, width = l.norms_whole ? n : l.head_width;
    check(scheinfer_norm(x, weight, x, rows, width, l.head_eps, call.dtype, call.isa, call.n_threads));
  }
  clip(call, x, n);
  check(scheinfer_turn(x, l.cosine, l.sine, call.S, heads, l.head_width, l.table_stride, call.dtype, call.isa,
                       call.n_threads));
}

void append(const Call& call, const char* from, void* buffer, const int64_t* strides) {
  const Layer& l = call.l;
  const int64_t bytes = call.bytes, size = l.head_width * bytes;
  for_rows(call.n_threads, call.S * l.n_kv_heads, l.head_width, [=, &l](int64_t i) {
    const int64_t row = i / l.n_kv_heads, token = l.n_past - l.n_dropped + row % l.n_new;
    const int64_t at = row / l.n_new * strides[0] + i % l.n_kv_heads * strides[1] + token * strides[2];
    memcpy(static_cast<char*>(buffer) + at * bytes, from + i * size, size_t(size));
  });
}

// Queries over what the buffers hold of their sequences, each up to its own token.
void mix(const Call& call) {
  const Layer& l = call.l;
  const int64_t n_sequences = call.S / l.n_new, n_keys = l.n_past - l.n_dropped + l.n_new;
  const int64_t *key = l.key_strides, *value = l.value_strides, d = l.head_width;
  const int64_t shape[] = {n_sequences, l.n_new, l.n_heads, l.n_kv_heads, n_keys, d, d,
                           key[0], key[1], key[2], value[0], value[1], value[2], l.window};
  check(scheinfer_attend(call.query, l.keys, l.values, call.mixed, shape, l.scale, l.sinks, call.dtype, call.isa,
                         call.n_threads));
}

// mixed = what heads make of normed rows.
void mix_heads(const Call& call) {
  const Layer& l = call.l;
  if (l.latent) {
    Layer rows = l;
    rows.x = call.normed;
    return check(scheinfer_latent(&rows, call.mixed, call.n_threads));
  }
  const int64_t n_query = l.n_heads * l.head_width, n_key = l.n_kv_heads * l.head_width;
  call.project(call.normed, l.width,
               {word(l.query), word(l.query_bias), word(call.query), n_query, word(l.key), word(l.key_bias),
                word(call.key), n_key, word(l.value), word(l.value_bias), word(call.value), n_key});
  place(call, call.query, l.query_norm, l.n_heads);
  place(call, call.key, l.key_norm, l.n_kv_heads);
  clip(call, call.value, n_key);
  append(call, call.key, l.keys, l.key_strides);
  append(call, call.value, l.values, l.value_strides);
  mix(call);
}

void attention(const Call& call) {
  const Layer& l = call.l;
  call.norm(l.x, l.input_norm, l.input_norm_bias, l.input_eps, call.normed);
  mix_heads(call);
  const int64_t n_mixed = l.n_heads * (l.latent ? l.value_width : l.head_width);
  call.project(call.mixed, n_mixed, {word(l.output), word(l.output_bias), word(call.part), l.width});
  call.add_and_norm();
}

// -- experts ---------------------------------------------------------------------------------------------------------

struct Choice {
  std::vector<std::vector<int64_t>> rows;    // by expert
  std::vector<std::vector<float>> weights;
};

Choice choose(const Call& call) {
  const Layer& l = call.l;
  Choice choice{std::vector<std::vector<int64_t>>(size_t(l.n_experts)),
                std::vector<std::vector<float>>(size_t(l.n_experts))};
  const int64_t gate[] = {word(l.shared_weight), 0, word(call.gate), 1};
  const size_t n = size_t(call.S * l.top_k);
  std::vector<int64_t> chosen(n);
  std::vector<float> weights(n);
  check(route(l, call.normed, call.S, call.logits, gate, l.shared_weight != nullptr, chosen.data(), weights.data(),
              call.n_threads));
  for (size_t i = 0; i < n; i++) {
    choice.rows[size_t(chosen[i])].push_back(int64_t(i) / l.top_k);
    choice.weights[size_t(chosen[i])].push_back(weights[i]);
  }
  return choice;
}

// shared = expert(normed), times sigmoid(gate) where it has one.
void share(const Call& call) {
  const Layer& l = call.l;
  call.mlp(call.shared, 1, {0, 0, call.S, 1, word(l.shared_gate), word(l.shared_up), word(l.shared_down),
                            l.shared_columns, 0});
  if (!l.shared_weight) return;
  std::vector<float> gates(size_t(call.S));
  call.k->widen_row(call.gate, call.S, gates.data());
  for (float& v : gates) v = 1.0f / (1.0f + expf(-v));
  call.k->store_row(gates.data(), call.S, call.gate);
  call.k->widen_row(call.gate, call.S, gates.data());
  alter(call, call.shared, l.width, [&](float* v, int64_t n, int64_t s) {
    for (int64_t i = 0; i < n; i++) v[i] *= gates[size_t(s)];
  });
}

// part += what experts add to their rows, by their weights.
void add_down_bias(const Call& call, const Choice& choice) {
  const Layer& l = call.l;
  std::vector<std::vector<std::pair<int64_t, float>>> of_row(size_t(call.S));
  for (int64_t e = 0; e < l.n_experts; e++)
    for (size_t i = 0; i < choice.rows[size_t(e)].size(); i++)
      of_row[size_t(choice.rows[size_t(e)][i])].push_back({e, choice.weights[size_t(e)][i]});
  for_rows(call.n_threads, call.S, l.width * l.top_k, [&](int64_t s) {
    constexpr int64_t AT_ONCE = 512;
    float sum[AT_ONCE], more[AT_ONCE];
    for (int64_t d = 0; d < l.width; d += AT_ONCE) {
      const int64_t n = l.width - d < AT_ONCE ? l.width - d : AT_ONCE;
      char* const at = call.part + (s * l.width + d) * call.bytes;
      call.k->widen_row(at, n, sum);
      for (const auto& [e, weight] : of_row[size_t(s)]) {
        call.k->widen_row(static_cast<const char*>(l.down_bias) + (e * l.width + d) * call.bytes, n, more);
        for (int64_t i = 0; i < n; i++) sum[i] += weight * more[i];
      }
      call.k->store_row(sum, n, at);
    }
  });
}

void experts(const Call& call, const Choice& choice) {
  const Layer& l = call.l;
  std::vector<int64_t> words;
  int64_t n = 0;
  for (int64_t e = 0; e < l.n_experts; e++) {
    const int64_t n_rows = l.router ? int64_t(choice.rows[size_t(e)].size()) : call.S;
    l.counts[e] = n_rows;
    if (!n_rows) continue;
    const int64_t* pieces = l.experts + e * 5 * l.n_pieces;
    if (l.router) words.insert(words.end(), {word(choice.rows[size_t(e)].data()), word(choice.weights[size_t(e)].data())});
    else words.insert(words.end(), {0, 0});
    words.insert(words.end(), {n_rows, l.n_pieces});
    words.insert(words.end(), pieces, pieces + 5 * l.n_pieces);
    n++;
  }
  call.mlp(call.part, n, words);
  if (l.down_bias) add_down_bias(call, choice);
  if (l.shared_gate) call.add(call.part, call.shared, call.part);
  call.add(call.hidden, call.part, l.y);
}

// -- all of it -------------------------------------------------------------------------------------------------------

size_t lay_out(Call& call, char* memory) {
  const Layer& l = call.l;
  const int64_t n_key = l.n_kv_heads * l.head_width, S = call.S;
  const int64_t n_query = l.n_heads * (l.latent ? l.value_width : l.head_width);
  int64_t at = 0;
  const auto next = [&](int64_t n, int64_t bytes) {
    char* here = memory + at;
    at += up_to(n * bytes, 64);
    return here;
  };
  char** const wide[] = {&call.part, &call.hidden, &call.normed, &call.shared};
  for (char** p : wide) *p = next(S * l.width, call.bytes);
  call.query = next(S * n_query, call.bytes), call.mixed = next(S * n_query, call.bytes);
  call.key = next(S * n_key, call.bytes), call.value = next(S * n_key, call.bytes);
  call.logits = next(S * l.n_experts, 4), call.gate = next(S, call.bytes);
  return size_t(at);
}

void compute(const Call& call, Layer& l) {
  l.times[0] = now_ns();
  attention(call);
  const Choice choice = l.router ? choose(call) : Choice{};
  if (l.shared_gate) share(call);
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
    l.rows = all->rows, l.n_new = 1, l.n_past = all->n_past, l.x = all->n_done ? all->y : all->x, l.y = all->y;
    l.cosine = all->cosine, l.sine = all->sine, l.table_stride = all->table_stride;
    if (const int failed = scheinfer_layer(&l, n_threads)) return failed;
  }
  const Layer& last = *all->layers[all->n_layers - 1];
  if (last.norms_once) {
    const Kernels* k = kernels(int(last.isa), int(last.dtype));
    Call{last, k, 1, all->rows, last.dtype == F32 ? 4 : 2, int(last.dtype), int(last.isa)}.norm_once(all->y, all->norm,
                                                                                                      all->eps, all->y);
    return 0;
  }
  if (all->norm_bias)
    return scheinfer_layer_norm(all->y, all->norm, all->norm_bias, all->y, all->rows, last.width, all->eps,
                                int(last.dtype), int(last.isa), 1);
  return scheinfer_norm(all->y, all->norm, all->y, all->rows, last.width, all->eps, int(last.dtype), int(last.isa), 1);
}
}
