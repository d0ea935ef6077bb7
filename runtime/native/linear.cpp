// Dense projections of the same rows: y[t][r] = x[t] . w[r] + bias[r], rows of W shared out, sums in float32. Enough rows
// are multiplied by tiles where the CPU has them.
#include <cstring>
#include <vector>

#include "rows.h"

namespace scheinfer {
namespace {

struct Projection {
  const char *w, *bias;  // bias: null for none
  char* y;
  int64_t N;
};

struct Item {
  const Projection* of;
  int64_t first, last;
  int64_t block, n_blocks;  // of tokens, if by tiles
};

struct Call {
  const Kernels* k;
  const char* source;
  char* x;  // padded rows, or packed blocks
  int64_t K, S, weight_bytes, x_stride;
  std::vector<Projection> projections;
  std::vector<Item> items;
  bool wide;  // y is float32
};

// A block of x, if by tiles.
void pack_block(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  const void* rows[SIDE];
  int64_t n = 0;
  for (int64_t t = index * SIDE; t < call.S && n < SIDE; t++) rows[n++] = call.source + t * call.K * call.weight_bytes;
  call.k->tiles->pack(rows, n, call.K, index, blocks_of(call.S), call.x);
}

// A strip of an item's rows; none if there is no such item.
Strip strip_of(const Call& call, int64_t index, int64_t strip) {
  if (index >= int64_t(call.items.size())) return {};
  const Item& item = call.items[size_t(index)];
  const int64_t first = item.first + strip * STRIP_ROWS, half = STRIP_ROWS / 2;
  const int64_t n = item.last - first < STRIP_ROWS ? item.last - first : STRIP_ROWS, some = n < half ? n : half;
  const char* w = item.of->w + first * call.K * call.weight_bytes;
  return {{w, w + some * call.K * call.weight_bytes}, {some, n - some}};
}

// An item's share of a row of y that is float32.
float* wide_row(const Item& item, int64_t t) {
  return reinterpret_cast<float*>(item.of->y) + t * item.of->N + item.first;
}

void project_by_tiles(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  struct Rows {
    const Call& call;
    const Item& item;
    float bias[MOST_STRIPS * STRIP_ROWS];
  } rows{call, call.items[size_t(index)], {}};
  const Item& item = rows.item;
  if (item.of->bias) call.k->widen_row(item.of->bias + item.first * call.weight_bytes, item.last - item.first, rows.bias);
  Scratch& s = scratch();
  Strip strips[MOST_STRIPS];
  int64_t n = 0;
  for (; item.first + n * STRIP_ROWS < item.last; n++) strips[n] = strip_of(call, index, n);
  const int64_t first = item.block * SIDE, last = first + item.n_blocks * SIDE;
  for (int64_t t = first; call.wide && t < last && t < call.S; t++)  // to which tiles add
    memcpy(wide_row(item, t), rows.bias, size_t(item.last - item.first) * sizeof(float));
  call.k->tiles->multiply({strips, n, strip_of(call, index + 1, 0), call.K, call.K,
                           call.x, blocks_of(call.S), item.block, item.n_blocks, s.sums, s.wide,
                           [](const void* context, int64_t strip, int64_t block, int part, const float* sums) {
                             const auto& [call, item, bias] = *static_cast<const Rows*>(context);
                             const Projection& p = *item.of;
                             const int64_t t = (item.block + block) * SIDE, r = strip * STRIP_ROWS;
                             const int64_t n_rows = item.last - item.first - r, left = call.S - t;
                             const int64_t n_tokens = left < SIDE ? left : SIDE;
                             if (call.wide) {
                               float* to[SIDE];
                               for (int64_t i = 0; i < n_tokens; i++) to[i] = wide_row(item, t + i) + r;
                               return call.k->tiles->add(sums, part, n_rows, n_tokens, nullptr, to);
                             }
                             char* y = p.y + (t * p.N + item.first + r) * call.weight_bytes;
                             call.k->tiles->store(sums, part, n_rows, n_tokens, bias + r, y, p.N * call.weight_bytes);
                           },
                           &rows});
}

const char* weights_of(const Call& call, const Item& item) {
  return item.of->w + item.first * call.K * call.weight_bytes;
}

void project(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  const Item& item = call.items[size_t(index)];
  const Projection& p = *item.of;
  Scratch& s = scratch();
  const int64_t n = item.last - item.first, next = index + 1;
  const bool follows = next < int64_t(call.items.size()) && call.items[size_t(next)].last - call.items[size_t(next)].first >= n;
  const char *w = weights_of(call, item), *later = follows ? weights_of(call, call.items[size_t(next)]) : nullptr;
  float bias[MOST_ROWS + PAD] = {};
  if (p.bias) call.k->widen_row(p.bias + item.first * call.weight_bytes, n, bias);
  const Chunks chunks(call.k, call.S);
  const auto dots = dots_of(call.k, call.S);
  for (int64_t c = 0; c < chunks.n(); c++) {
    const int64_t t0 = chunks.first(c), tokens = chunks.first(c + 1) - t0;
    const void* x[MANY_AT_ONCE];
    for (int64_t t = 0; t < tokens; t++) x[t] = call.x + (t0 + t) * call.x_stride;
    dots(w, n, call.K, x, tokens, s.one, MOST_ROWS, c + 1 < chunks.n() ? nullptr : later, s.wide);
    for (int64_t t = 0; t < tokens; t++) {
      float* row = s.one + t * MOST_ROWS;
      for (int64_t i = 0; i < n; i++) row[i] += bias[i];
      if (call.wide)
        memcpy(wide_row(item, t0 + t), row, size_t(n) * sizeof(float));
      else
        call.k->store_row(row, n, p.y + ((t0 + t) * p.N + item.first) * call.weight_bytes);
    }
  }
}

int compute(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype, int isa,
            int n_threads, bool wide) {
  static thread_local Aligned memory;
  try {
    const Kernels* k = kernels(isa, dtype);
    if (!k) return 2;
    const bool tiled = by_tiles(k, S);
    const int64_t bytes = dtype == F32 ? 4 : 2, stride = tiled ? block_bytes(K) : stride_of(K, k->activation_bytes);
    char* rows = memory.at_least(size_t((tiled ? blocks_of(S) : S) * stride));
    Call call{k, static_cast<const char*>(x), rows, K, S, bytes, stride, {}, {}, wide};
    if (tiled)
      parallel(n_threads, blocks_of(S), pack_block, &call);
    else
      for_rows(n_threads, S, K, [&](int64_t s) { k->load_row(call.source + s * K * bytes, K, rows + s * stride); });
    int64_t n_rows = 0;
    for (int64_t i = 0; i < n_projections; i++, words += 4) {
      call.projections.push_back({reinterpret_cast<const char*>(words[0]), reinterpret_cast<const char*>(words[1]),
                                  reinterpret_cast<char*>(words[2]), words[3]});
      n_rows += words[3];
    }
    const int64_t most = tiled ? tiled_rows_at_once(n_rows, n_threads) : rows_at_once(n_rows, n_threads, are_many(k, S));
    const Groups groups(S);
    for (int64_t g = 0; g == 0 || (tiled && g < groups.n()); g++)
      for (const Projection& p : call.projections)
        for (int64_t first = 0; first < p.N; first += most) {
          const int64_t last = first + most < p.N ? first + most : p.N, block = groups.first(g);
          call.items.push_back({&p, first, last, block, groups.first(g + 1) - block});
        }
    parallel(n_threads, int64_t(call.items.size()), tiled ? project_by_tiles : project, &call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

extern "C" {

// x [S, K]; words of each projection: w [N, K], bias [N] or null, y [S, N], N; all of one dtype. 0, or 1 without memory,
// 2 without that instruction set.
int scheinfer_linear(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                     int isa, int n_threads) {
  return compute(x, S, K, n_projections, words, dtype, isa, n_threads, false);
}

// The same with y in float32: the sums themselves.
int scheinfer_linear_wide(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                          int isa, int n_threads) {
  return compute(x, S, K, n_projections, words, dtype, isa, n_threads, true);
}
}
