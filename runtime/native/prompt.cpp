// A prompt's attention: new tokens over a sequence's past and over each other, each up to itself.
#include "rows.h"

namespace scheinfer {
namespace {

constexpr int64_t ITEM_TILES = 8;

struct Attention {
  const Kernels* k;
  const char *query, *key, *value;
  char *out, *keys, *values;  // keys and values packed, by KV head of a sequence
  int64_t n_new, n_keys, group, n_heads, n_kv, bytes;
  const int64_t *key_at, *value_at;  // strides in bytes of batch and head
  Past past;
  Blocks sizes;
  const float* sinks;
};

int64_t n_blocks(const Attention& a) { return (a.n_keys + BLOCK_KEYS - 1) / BLOCK_KEYS; }

void pack_block(void* context, int64_t index) {
  const Attention& a = *static_cast<const Attention*>(context);
  const int64_t head = index / n_blocks(a), first = index % n_blocks(a) * BLOCK_KEYS;
  const int64_t n = a.n_keys - first < BLOCK_KEYS ? a.n_keys - first : BLOCK_KEYS;
  const char* key = a.key + head / a.n_kv * a.key_at[0] + head % a.n_kv * a.key_at[1];
  const char* value = a.value + head / a.n_kv * a.value_at[0] + head % a.n_kv * a.value_at[1];
  a.k->pack_keys(key + first * a.past.key_stride * a.bytes, n, a.past, a.keys + index * a.sizes.key_bytes);
  a.k->pack_values(value + first * a.past.value_stride * a.bytes, n, a.past, a.values + index * a.sizes.value_bytes);
}

int64_t n_items(const Attention& a) {
  const int64_t each = a.k->attends_at_once * ITEM_TILES;
  return (a.n_new + each - 1) / each;
}

// One head's queries of a few tiles; those tokens of a sequence which see most come last, and their share is the longest.
void attend_some(void* context, int64_t index) {
  const Attention& a = *static_cast<const Attention*>(context);
  const int64_t at_once = a.k->attends_at_once, per_sequence = n_items(a) * a.n_heads, b = index / per_sequence;
  const int64_t item = index % per_sequence / a.n_heads, head = index % a.n_heads, kv = b * a.n_kv + head / a.group;
  const int64_t end = (item + 1) * at_once * ITEM_TILES;
  Past past = a.past;
  if (a.sinks) past.sink = a.sinks[head];
  Blocks blocks = a.sizes;
  blocks.keys = a.keys + kv * n_blocks(a) * a.sizes.key_bytes;
  blocks.values = a.values + kv * n_blocks(a) * a.sizes.value_bytes;
  for (int64_t t = item * at_once * ITEM_TILES; t < end && t < a.n_new; t += at_once) {
    const int n = int(a.n_new - t < at_once ? a.n_new - t : at_once);
    const void* queries[SIDE];
    void* out[SIDE];
    for (int m = 0; m < n; m++) {
      const int64_t row = (b * a.n_new + t + m) * a.n_heads + head;
      queries[m] = a.query + row * a.past.key_width * a.bytes;
      out[m] = a.out + row * a.past.value_width * a.bytes;
    }
    a.k->attend_rows(n, blocks, queries, a.n_keys - a.n_new + t, past, out);
  }
}

}  // namespace

bool may_pack(const Kernels* k, const int64_t* shape) {
  return k->attend_rows && shape[5] <= MOST_WIDTH && shape[6] <= MOST_WIDTH;
}

bool are_many_queries(const Kernels* k, const int64_t* shape) {
  const int64_t n_new = shape[1], group = shape[2] / shape[3];
  return may_pack(k, shape) && n_new > 1 && n_new * group > k->few_queries;
}

bool has_window(const Heads& heads) { return heads.past.window < heads.shape[4]; }

void attend_prompt(const Kernels* k, const Heads& all, int n_threads) {
  static thread_local Aligned memory;
  const int64_t *shape = all.shape, batch = shape[0], heads = shape[2], n_kv = shape[3], bytes = all.bytes;
  const int64_t key_at[2] = {shape[7] * bytes, shape[8] * bytes}, value_at[2] = {shape[10] * bytes, shape[11] * bytes};
  const int64_t size = k->activation_bytes, panel_bytes = BLOCK_KEYS * BLOCK_KEYS * size;
  const Past& past = all.past;
  const Blocks sizes{nullptr, nullptr, BLOCK_KEYS * up_to(past.key_width, PAD) * size,
                     up_to(past.value_width, BLOCK_KEYS) / BLOCK_KEYS * panel_bytes, panel_bytes};
  Attention a{k, static_cast<const char*>(all.query), static_cast<const char*>(all.key),
              static_cast<const char*>(all.value), static_cast<char*>(all.out), nullptr, nullptr, shape[1], shape[4],
              heads / n_kv, heads, n_kv, bytes, key_at, value_at, past, sizes, all.sinks};
  const int64_t n_packed = batch * n_kv * n_blocks(a);
  a.keys = memory.at_least(size_t(n_packed * (sizes.key_bytes + sizes.value_bytes)));
  a.values = a.keys + n_packed * sizes.key_bytes;
  parallel(n_threads, n_packed, pack_block, &a);
  parallel(n_threads, batch * heads * n_items(a), attend_some, &a);
}

}  // namespace scheinfer
