// What a step of few tokens computes beside products with weights: norms, rotations, few queries over a
// sequence's past.
#include <cmath>

#include "rows.h"

namespace scheinfer {
namespace {

struct Attention {
  const Kernels* k;
  const char *key, *value;
  char* out;
  int64_t n_new, n_keys, n_heads, n_kv, group, n_chunks, bytes;
  const int64_t *key_at, *value_at;  // strides in bytes of batch and head
  Past past;
  float *wide, *mixed, *tops;  // queries [B, S, H]; results by query and chunk
};

// Keys that a query sees of those from one on: all before its own token, and its own.
int64_t seen(const Attention& a, int64_t token, int64_t first) { return a.n_keys - a.n_new + token + 1 - first; }

// A KV head's queries of all new tokens over one chunk of its keys. Chunks are the same for any number of threads, so
// results are, too.
void attend_chunk(void* context, int64_t index) {
  const Attention& a = *static_cast<const Attention*>(context);
  const int64_t head = index / a.n_chunks, chunk = index % a.n_chunks, first = chunk * PAST_AT_ONCE;
  const int64_t b = head / a.n_kv, kv = head % a.n_kv;
  const char* keys = a.key + b * a.key_at[0] + kv * a.key_at[1] + first * a.past.key_stride * a.bytes;
  const char* values = a.value + b * a.value_at[0] + kv * a.value_at[1] + first * a.past.value_stride * a.bytes;
  constexpr int64_t AT_ONCE = 32;
  Seeing rows[AT_ONCE];
  int64_t n_rows = 0;
  for (int64_t s = 0; s < a.n_new; s++) {
    const int64_t n = seen(a, s, first) < PAST_AT_ONCE ? seen(a, s, first) : PAST_AT_ONCE;
    for (int64_t g = 0; g < a.group && n > 0; g++) {
      const int64_t query = (b * a.n_new + s) * a.n_heads + kv * a.group + g, at = query * a.n_chunks + chunk;
      rows[n_rows++] = {a.wide + query * a.past.key_width, n, a.mixed + at * a.past.value_width, a.tops + 2 * at};
      if (n_rows == AT_ONCE) a.k->attend_few(rows, n_rows, keys, values, a.past), n_rows = 0;
    }
  }
  a.k->attend_few(rows, n_rows, keys, values, a.past);
}

void join_chunks(const Attention& a, int64_t query) {
  float *mixed = a.mixed + query * a.n_chunks * a.past.value_width, *tops = a.tops + 2 * query * a.n_chunks;
  const int64_t n_chunks = (seen(a, query / a.n_heads % a.n_new, 0) + PAST_AT_ONCE - 1) / PAST_AT_ONCE;
  float top = tops[0], sum = 0.0f;
  for (int64_t c = 1; c < n_chunks; c++) top = tops[2 * c] > top ? tops[2 * c] : top;
  for (int64_t c = 0; c < n_chunks; c++) {
    const float scale = expf(tops[2 * c] - top);
    sum += scale * tops[2 * c + 1];
    float* part = mixed + c * a.past.value_width;
    for (int64_t d = 0; d < a.past.value_width; d++)
      mixed[d] = c ? mixed[d] + scale * part[d] : scale * part[d];
  }
  for (int64_t d = 0; d < a.past.value_width; d++) mixed[d] /= sum;
  a.k->store_row(mixed, a.past.value_width, a.out + query * a.past.value_width * a.bytes);
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

extern "C" {

// y [S, D] = weight [D] * x [S, D] over its root mean square.
int scheinfer_norm(const void* x, const void* weight, void* y, int64_t S, int64_t D, double eps, int dtype, int isa,
                   int n_threads) {
  const Kernels* k = kernels(isa, dtype);
  if (!k) return 2;
  const int64_t bytes = D * (dtype == F32 ? 4 : 2);
  for_rows(n_threads, S, D, [=](int64_t s) {
    k->norm_row(static_cast<const char*>(x) + s * bytes, weight, D, float(eps), static_cast<char*>(y) + s * bytes);
  });
  return 0;
}

// y [S, D] = weight [D] * (x - its mean) over its standard deviation, + bias [D].
int scheinfer_layer_norm(const void* x, const void* weight, const void* bias, void* y, int64_t S, int64_t D, double eps,
                         int dtype, int isa, int n_threads) {
  const Kernels* k = kernels(isa, dtype);
  if (!k) return 2;
  const int64_t bytes = D * (dtype == F32 ? 4 : 2);
  for_rows(n_threads, S, D, [=](int64_t s) {
    k->layer_norm_row(static_cast<const char*>(x) + s * bytes, weight, bias, D, float(eps),
                      static_cast<char*>(y) + s * bytes);
  });
  return 0;
}

// y [S, D] = one + other, rounded once.
int scheinfer_add(const void* one, const void* other, void* y, int64_t S, int64_t D, int dtype, int isa, int n_threads) {
  const Kernels* k = kernels(isa, dtype);
  if (!k) return 2;
  const int64_t bytes = D * (dtype == F32 ? 4 : 2);
  for_rows(n_threads, S, D, [=](int64_t s) {
    k->add_row(static_cast<const char*>(one) + s * bytes, static_cast<const char*>(other) + s * bytes, D,
               static_cast<char*>(y) + s * bytes);
  });
  return 0;
}

// Rotary embedding in place: x [S, heads, D], cosine and sine [S, D], or [1, D] for all rows (table_stride 0).
int scheinfer_turn(void* x, const void* cosine, const void* sine, int64_t S, int64_t heads, int64_t D,
                   int64_t table_stride, int dtype, int isa, int n_threads) {
  const Kernels* k = kernels(isa, dtype);
  if (!k) return 2;
  const int64_t bytes = dtype == F32 ? 4 : 2;
  for_rows(n_threads, S, heads * D, [=](int64_t s) {
    const int64_t table = s * table_stride * bytes;
    for (int64_t i = s * heads; i < (s + 1) * heads; i++)
      k->turn_row(static_cast<char*>(x) + i * D * bytes, static_cast<const char*>(cosine) + table,
                  static_cast<const char*>(sine) + table, D);
  });
  return 0;
}

// out [B, S, H, value_width] of query [B, S, H, key_width] over n_keys keys and values, of which the last S are the
// queries' own. shape: B, S, H, KV heads, n_keys, key_width, value_width, then strides in elements of batch, head and row
// of key and value. 0, or 1 without memory, 2 without that instruction set. Few queries read keys and values as they
// lie; of many, all are packed first.
int scheinfer_attend(const void* query, const void* key, const void* value, void* out, const int64_t* shape,
                     double scale, int dtype, int isa, int n_threads) {
  static thread_local Aligned memory;
  try {
    const Kernels* k = kernels(isa, dtype);
    if (!k) return 2;
    if (are_many_queries(k, shape)) return attend_prompt(k, query, key, value, out, shape, scale, dtype, n_threads);
    const int64_t n_kv = shape[3], n_keys = shape[4], bytes = dtype == F32 ? 4 : 2;
    const int64_t n = shape[0] * shape[1] * shape[2], n_chunks = (n_keys + PAST_AT_ONCE - 1) / PAST_AT_ONCE;
    const int64_t key_at[2] = {shape[7] * bytes, shape[8] * bytes}, value_at[2] = {shape[10] * bytes, shape[11] * bytes};
    const Past past{shape[5], shape[6], shape[9], shape[12], float(scale)};
    const size_t n_wide = size_t(n * past.key_width + PAD), n_mixed = size_t(n * n_chunks * past.value_width);
    float* room = reinterpret_cast<float*>(
        memory.at_least((n_wide + n_mixed + size_t(2 * n * n_chunks)) * sizeof(float)));
    k->widen_row(query, n * past.key_width, room);
    Attention a{k, static_cast<const char*>(key), static_cast<const char*>(value), static_cast<char*>(out), shape[1],
                n_keys, shape[2], n_kv, shape[2] / n_kv, n_chunks, bytes, key_at, value_at, past,
                room, room + n_wide, room + n_wide + n_mixed};
    parallel(n_threads, shape[0] * n_kv * n_chunks, attend_chunk, &a);
    for_rows(n_threads, n, n_chunks * past.value_width, [&](int64_t query) { join_chunks(a, query); });
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
