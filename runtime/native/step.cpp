// What a step of few tokens computes beside products with weights: norms, rotations, one query over a sequence's past.
#include <cmath>
#include <vector>

#include "rows.h"

namespace scheinfer {
namespace {

struct Attention {
  const Kernels* k;
  const char *key, *value;
  char* out;
  int64_t n_past, group, n_chunks, bytes;
  const int64_t *key_at, *value_at;  // bytes from the beginning, by KV head of a sequence
  Past past;
  float *wide, *mixed, *tops;  // queries; results by query and chunk
};

// A KV head's queries over one chunk of its past. Chunks are the same for any number of threads, so results are, too.
void attend_chunk(void* context, int64_t index) {
  const Attention& a = *static_cast<const Attention*>(context);
  const int64_t head = index / a.n_chunks, chunk = index % a.n_chunks, first = chunk * PAST_AT_ONCE;
  const int64_t n = a.n_past - first < PAST_AT_ONCE ? a.n_past - first : PAST_AT_ONCE;
  const char* keys = a.key + a.key_at[head] + first * a.past.key_stride * a.bytes;
  const char* values = a.value + a.value_at[head] + first * a.past.value_stride * a.bytes;
  for (int64_t g = head * a.group; g < (head + 1) * a.group; g++) {
    const int64_t at = g * a.n_chunks + chunk;
    a.k->attend_row(a.wide + g * a.past.key_width, keys, values, n, a.past, a.mixed + at * a.past.value_width,
                    a.tops + 2 * at);
  }
}

void join_chunks(const Attention& a, int64_t g) {
  float *mixed = a.mixed + g * a.n_chunks * a.past.value_width, *tops = a.tops + 2 * g * a.n_chunks;
  float top = tops[0], sum = 0.0f;
  for (int64_t c = 1; c < a.n_chunks; c++) top = tops[2 * c] > top ? tops[2 * c] : top;
  for (int64_t c = 0; c < a.n_chunks; c++) {
    const float scale = expf(tops[2 * c] - top);
    sum += scale * tops[2 * c + 1];
    float* part = mixed + c * a.past.value_width;
    for (int64_t d = 0; d < a.past.value_width; d++)
      mixed[d] = c ? mixed[d] + scale * part[d] : scale * part[d];
  }
  for (int64_t d = 0; d < a.past.value_width; d++) mixed[d] /= sum;
  a.k->store_row(mixed, a.past.value_width, a.out + g * a.past.value_width * a.bytes);
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

// query [B * K, group, key_width] over keys and values of n_past rows each, whose heads begin at strides; see Attention.
// shape: B, K, group, n_past, key_width, value_width, then strides in elements of batch, head and row of key and value.
int scheinfer_attend(const void* query, const void* key, const void* value, void* out, const int64_t* shape,
                     double scale, int dtype, int isa, int n_threads) {
  static thread_local Aligned memory;
  try {
    const Kernels* k = kernels(isa, dtype);
    if (!k) return 2;
    const int64_t batch = shape[0], heads = shape[1], group = shape[2], n_past = shape[3], bytes = dtype == F32 ? 4 : 2;
    const int64_t n = batch * heads * group, n_chunks = (n_past + PAST_AT_ONCE - 1) / PAST_AT_ONCE;
    std::vector<int64_t> key_at, value_at;
    for (int64_t i = 0; i < batch * heads; i++) {
      key_at.push_back((i / heads * shape[6] + i % heads * shape[7]) * bytes);
      value_at.push_back((i / heads * shape[9] + i % heads * shape[10]) * bytes);
    }
    const Past past{shape[4], shape[5], shape[8], shape[11], float(scale)};
    const size_t n_wide = size_t(n * past.key_width + PAD), n_mixed = size_t(n * n_chunks * past.value_width);
    float* room = reinterpret_cast<float*>(
        memory.at_least((n_wide + n_mixed + size_t(2 * n * n_chunks)) * sizeof(float)));
    k->widen_row(query, n * past.key_width, room);
    Attention a{k, static_cast<const char*>(key), static_cast<const char*>(value),
                static_cast<char*>(out), n_past, group, n_chunks, bytes, key_at.data(), value_at.data(), past,
                room, room + n_wide, room + n_wide + n_mixed};
    parallel(n_threads, batch * heads * n_chunks, attend_chunk, &a);
    for (int64_t g = 0; g < n; g++) join_chunks(a, g);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
