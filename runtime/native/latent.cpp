// Latent attention: the cache holds, of each token, one row for all heads, the normed latent and behind it the rotated
// part of the key. A head's key is what `expand` makes of the latent and that part, its value is made of the latent.
//
// Few new tokens expand nothing. A query over expanded latents is the query times `expand`, over the latents as they
// lie; the sum of expanded values is `expand` times the sum of latents. So all heads share keys and values, and
// `expand` is read once. Of many new tokens each latent is seen so often that expanding all of them takes less.
#include <algorithm>
#include <cstring>
#include <vector>

#include "layer.h"
#include "rows.h"

extern "C" {
int scheinfer_linear(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                     int isa, int n_threads);
int scheinfer_norm(const void* x, const void* weight, void* y, int64_t S, int64_t D, double eps, int dtype, int isa,
                   int n_threads);
int scheinfer_attend(const void* query, const void* key, const void* value, void* out, const int64_t* shape,
                     double scale, const void* sinks, int dtype, int isa, int n_threads);
}

namespace scheinfer {
namespace {

int64_t word(const void* p) { return reinterpret_cast<int64_t>(p); }

constexpr int64_t MOST_EXPANDED = 32 << 20;  // bytes

struct Call {
  const Kernels* k;
  const Layer& l;
  int n_threads, dtype, isa;
  int64_t bytes, S;
  int64_t query_width, row_width, pair_width;  // of a head's query, a row of the cache, a head's key and value
  char* out;                                   // [S, heads, value_width]
  char *query = nullptr, *down = nullptr, *row = nullptr;  // of new tokens
  char *absorbed = nullptr, *mixed = nullptr;              // few: queries and results as wide as rows and latents
  float* sums = nullptr;                                   // of each head
  char *latents = nullptr, *pairs = nullptr, *keys = nullptr;  // many: of all tokens, for some heads at once
  char *queries = nullptr, *results = nullptr;                 // of new tokens for some heads, if not of all

  Call(const Kernels* k, const Layer& l, void* out, int n_threads)
      : k(k), l(l), n_threads(n_threads), dtype(int(l.dtype)), isa(int(l.isa)), bytes(dtype == F32 ? 4 : 2), S(l.rows),
        query_width(l.pass_width + l.head_width), row_width(l.latent_width + l.head_width),
        pair_width(l.pass_width + l.value_width), out(static_cast<char*>(out)) {}

  int64_t n_sequences() const { return S / l.n_new; }
  int64_t n_keys() const { return l.n_past + l.n_new; }
  // Whether so few tokens are new that nothing is expanded. What is expanded is multiplied by tiles where there are
  // any; behind 512 tokens both ways take the same for 12 to 16 new ones then, else for 64 to 128 in float32.
  bool absorbs() const { return l.n_new <= (k->tiles ? 12 : 32); }
  // Heads whose keys and values of all tokens are made at once.
  int64_t heads_at_once() const {
    const int64_t most = MOST_EXPANDED / (n_sequences() * n_keys() * (pair_width + query_width) * bytes);
    return most < 1 ? 1 : most < l.n_heads ? most : l.n_heads;
  }
  int linear(const void* x, int64_t n, int64_t K, const std::vector<int64_t>& words) const {
    return scheinfer_linear(x, n, K, int64_t(words.size() / 4), words.data(), dtype, isa, n_threads);
  }
  // Where the cache holds a token of a sequence, and which of its tokens a new one is.
  char* held(void* buffer, const int64_t* strides, int64_t sequence, int64_t token) const {
    return static_cast<char*>(buffer) + (sequence * strides[0] + token * strides[2]) * bytes;
  }
};

size_t lay_out(Call& call, char* memory) {
  const Layer& l = call.l;
  const int64_t heads = l.n_heads, S = call.S, n = call.absorbs() ? 0 : call.n_sequences() * call.n_keys();
  const int64_t few = call.absorbs() ? S * heads : 0, some = call.absorbs() ? 0 : call.heads_at_once();
  const int64_t apart = some < heads ? S * some : 0;
  int64_t at = 0;
  const auto next = [&](int64_t n, int64_t width, int64_t size) {
    char* here = memory + at;
    at += up_to(n * width * size, 64);
    return here;
  };
  call.query = next(S * heads, call.query_width, call.bytes), call.down = next(S, l.query_rank, call.bytes);
  call.row = next(S, call.row_width, call.bytes);
  call.absorbed = next(few, call.row_width, call.bytes), call.mixed = next(few, l.latent_width, call.bytes);
  call.sums = reinterpret_cast<float*>(next(few ? heads : 0, l.latent_width + l.pass_width, 4));
  call.latents = next(n, l.latent_width, call.bytes), call.pairs = next(n * some, call.pair_width, call.bytes);
  call.keys = next(n * some, call.query_width, call.bytes);
  call.queries = next(apart, call.query_width, call.bytes), call.results = next(apart, l.value_width, call.bytes);
  return size_t(at);
}

// -- what is new -----------------------------------------------------------------------------------------------------

int project(const Call& call) {
  const Layer& l = call.l;
  const int64_t n_query = l.n_heads * call.query_width;
  std::vector<int64_t> words{word(l.latent), word(l.latent_bias), word(call.row), call.row_width};
  if (l.query_down)
    words.insert(words.end(), {word(l.query_down), word(l.query_down_bias), word(call.down), l.query_rank});
  else
    words.insert(words.end(), {word(l.query), word(l.query_bias), word(call.query), n_query});
  if (const int failed = call.linear(l.x, call.S, l.width, words)) return failed;
  if (!l.query_down) return 0;
  const int failed = scheinfer_norm(call.down, l.query_norm, call.down, call.S, l.query_rank, l.head_eps, call.dtype,
                                    call.isa, call.n_threads);
  if (failed) return failed;
  return call.linear(call.down, call.S, l.query_rank, {word(l.query), word(l.query_bias), word(call.query), n_query});
}

// Rotates what lies at x, of a row's token, as the layer says.
void turn(const Call& call, char* x, int64_t s) {
  const Layer& l = call.l;
  const int64_t n = l.head_width, half = n / 2, bytes = call.bytes;
  float wide[MOST_WIDTH];
  if (l.turns == PAIRS) {  // complex numbers in float32, rounded once
    const float* angles = static_cast<const float*>(l.cosine) + s * l.table_stride;
    call.k->widen_row(x, n, wide);
    for (int64_t i = 0; i < n; i += 2) {
      const float a = wide[i], b = wide[i + 1];
      wide[i] = a * angles[i] - b * angles[i + 1], wide[i + 1] = a * angles[i + 1] + b * angles[i];
    }
    return call.k->store_row(wide, n, x);
  }
  const int64_t table = s * l.table_stride * bytes;
  if (l.turns == PAIRS_APART) {
    char* apart = reinterpret_cast<char*>(wide);
    for (int64_t i = 0; i < n; i++) memcpy(apart + (i / 2 + i % 2 * half) * bytes, x + i * bytes, size_t(bytes));
    memcpy(x, apart, size_t(n * bytes));
  }
  call.k->turn_row(x, static_cast<const char*>(l.cosine) + table, static_cast<const char*>(l.sine) + table, n);
}

// New tokens' rows of the cache; the rotated part of their queries.
void place(const Call& call) {
  const Layer& l = call.l;
  const int64_t bytes = call.bytes, width = l.n_heads * call.query_width;
  for_rows(call.n_threads, call.S, width, [&, bytes, width](int64_t s) {
    const int64_t sequence = s / l.n_new, token = l.n_past + s % l.n_new;
    char *row = call.row + s * call.row_width * bytes, *turned = row + l.latent_width * bytes;
    call.k->norm_row(row, l.key_norm, l.latent_width, float(l.head_eps),
                     call.held(l.keys, l.key_strides, sequence, token));
    turn(call, turned, s);
    memcpy(call.held(l.values, l.value_strides, sequence, token), turned, size_t(l.head_width * bytes));
    for (int64_t h = 0; h < l.n_heads; h++)
      turn(call, call.query + (s * width + h * call.query_width + l.pass_width) * bytes, s);
  });
}

// -- few new tokens --------------------------------------------------------------------------------------------------

const char* expand(const Call& call, int64_t head) {
  return static_cast<const char*>(call.l.expand) + head * call.pair_width * call.l.latent_width * call.bytes;
}

// A head's queries times its rows of `expand` that make keys.
void absorb(void* context, int64_t head) {
  const Call& call = *static_cast<const Call*>(context);
  const Layer& l = call.l;
  float *sum = call.sums + head * (l.latent_width + l.pass_width), *query = sum + l.latent_width;
  for (int64_t s = 0; s < call.S; s++) {
    const int64_t at = s * l.n_heads + head;
    const char* from = call.query + at * call.query_width * call.bytes;
    char* to = call.absorbed + at * call.row_width * call.bytes;
    call.k->widen_row(from, l.pass_width, query);
    call.k->weigh_rows(expand(call, head), l.pass_width, l.latent_width, query, sum);
    call.k->store_row(sum, l.latent_width, to);
    memcpy(to + l.latent_width * call.bytes, from + l.pass_width * call.bytes, size_t(l.head_width * call.bytes));
  }
}

// A head's rows of `expand` that make values times its sums of latents.
void release(void* context, int64_t head) {
  const Call& call = *static_cast<const Call*>(context);
  const Layer& l = call.l;
  constexpr int64_t AT_ONCE = 16;
  const int64_t stride = stride_of(l.latent_width, call.k->activation_bytes), bytes = call.bytes;
  Scratch& room = scratch();
  char* const rows = reinterpret_cast<char*>(room.sums);  // a worker that asked for memory could not say there is none
  const int64_t at_once = std::min(AT_ONCE, int64_t(sizeof(room.sums)) / stride);
  for (int64_t s0 = 0; s0 < call.S; s0 += at_once) {
    const int64_t n = std::min(at_once, call.S - s0);
    const void* x[AT_ONCE];
    for (int64_t i = 0; i < n; i++) {
      const char* from = call.mixed + ((s0 + i) * l.n_heads + head) * l.latent_width * bytes;
      call.k->load_row(from, l.latent_width, rows + i * stride);
      x[i] = rows + i * stride;
    }
    for (int64_t r = 0; r < l.value_width; r += MOST_ROWS) {
      const int64_t some = l.value_width - r < MOST_ROWS ? l.value_width - r : MOST_ROWS;
      const char* w = expand(call, head) + (l.pass_width + r) * l.latent_width * bytes;
      call.k->dots(w, some, l.latent_width, x, n, room.one, MOST_ROWS, nullptr, room.wide);
      for (int64_t i = 0; i < n; i++)
        call.k->store_row(room.one + i * MOST_ROWS, some,
                          call.out + (((s0 + i) * l.n_heads + head) * l.value_width + r) * bytes);
    }
  }
}

int attend_few(Call& call) {
  const Layer& l = call.l;
  parallel(call.n_threads, l.n_heads, absorb, &call);
  // Of few keys, for which one thread would do, each half of the heads is an item.
  const int64_t n_items = call.n_keys() < 4 * PAST_AT_ONCE && l.n_heads % 8 == 0 ? 2 : 1;
  const int64_t* at = l.key_strides;
  const int64_t shape[] = {call.n_sequences(), l.n_new, l.n_heads, n_items, call.n_keys(), call.row_width,
                           l.latent_width, at[0], 0, at[2], at[0], 0, at[2], 0};
  const int failed = scheinfer_attend(call.absorbed, l.keys, l.keys, call.mixed, shape, l.scale, nullptr, call.dtype,
                                      call.isa, call.n_threads);
  if (!failed) parallel(call.n_threads, l.n_heads, release, &call);
  return failed;
}

// -- many ------------------------------------------------------------------------------------------------------------

// Keys and values of n heads from one on, of all tokens; queries and out of new tokens are of these heads, too.
int attend_some(const Call& call, int64_t first, int64_t n, const char* queries, char* out) {
  const Layer& l = call.l;
  const int64_t n_keys = call.n_keys(), n_tokens = call.n_sequences() * n_keys, bytes = call.bytes;
  const int64_t key = call.query_width, pair = call.pair_width;
  const int failed = call.linear(call.latents, n_tokens, l.latent_width,
                                 {word(expand(call, first)), 0, word(call.pairs), n * pair});
  if (failed) return failed;
  for_rows(call.n_threads, n_tokens, n * key, [&, bytes, n_keys](int64_t i) {
    const char* turned = call.held(l.values, l.value_strides, i / n_keys, i % n_keys);
    for (int64_t h = i * n; h < (i + 1) * n; h++) {
      char* to = call.keys + h * key * bytes;
      memcpy(to, call.pairs + h * pair * bytes, size_t(l.pass_width * bytes));
      memcpy(to + l.pass_width * bytes, turned, size_t(l.head_width * bytes));
    }
  });
  const int64_t shape[] = {call.n_sequences(), l.n_new, n, n, n_keys, key, l.value_width,
                           n_keys * n * key, key, n * key, n_keys * n * pair, pair, n * pair, 0};
  return scheinfer_attend(queries, call.keys, call.pairs + l.pass_width * bytes, out, shape, l.scale, nullptr,
                          call.dtype, call.isa, call.n_threads);
}

int attend_many(const Call& call) {
  const Layer& l = call.l;
  const int64_t n_keys = call.n_keys(), heads = l.n_heads, some = call.heads_at_once(), bytes = call.bytes;
  for_rows(call.n_threads, call.n_sequences() * n_keys, l.latent_width, [&, bytes, n_keys](int64_t i) {
    memcpy(call.latents + i * l.latent_width * bytes, call.held(l.keys, l.key_strides, i / n_keys, i % n_keys),
           size_t(l.latent_width * bytes));
  });
  if (some == heads) return attend_some(call, 0, heads, call.query, call.out);
  const int64_t query = call.query_width * bytes, result = l.value_width * bytes;
  for (int64_t first = 0; first < heads; first += some) {
    const int64_t n = heads - first < some ? heads - first : some;
    for_rows(call.n_threads, call.S, n * call.query_width, [&, query, n](int64_t s) {
      memcpy(call.queries + s * n * query, call.query + (s * heads + first) * query, size_t(n * query));
    });
    if (const int failed = attend_some(call, first, n, call.queries, call.results)) return failed;
    for_rows(call.n_threads, call.S, n * l.value_width, [&, result, n](int64_t s) {
      memcpy(call.out + (s * heads + first) * result, call.results + s * n * result, size_t(n * result));
    });
  }
  return 0;
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

// out [rows, heads, value_width]: attention of x, normed rows, before the output projection. 0, or 1 without memory, 2
// without that instruction set. Nothing but out and the new tokens' place in the cache is written.
extern "C" int scheinfer_latent(const Layer* layer, void* out, int n_threads) {
  static thread_local Aligned memory;
  try {
    const Kernels* k = kernels(int(layer->isa), int(layer->dtype));
    if (!k) return 2;
    Call call(k, *layer, out, n_threads);
    char* const room = memory.at_least(lay_out(call, nullptr));
    lay_out(call, room);
    if (const int failed = project(call)) return failed;
    place(call);
    return call.absorbs() ? attend_few(call) : attend_many(call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
