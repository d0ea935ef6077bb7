// A whole step of one new token for each of few sequences in one call: embedding, layers, norm, head.
#include <time.h>

#include <cstring>

#include "layer.h"
#include "rows.h"

extern "C" {
int scheinfer_layers(scheinfer::Layers* all, int n_threads);
int scheinfer_linear(const void* x, int64_t S, int64_t K, int64_t n_projections, const int64_t* words, int dtype,
                     int isa, int n_threads);
}

namespace scheinfer {
namespace {

constexpr int NOT_OURS = 3;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

int64_t position(const Forward& f, int64_t row) {
  return f.positions ? f.positions[row * f.position_stride] : f.layers.n_past;
}

bool is_ours(const Forward& f) {
  for (int64_t i = 0; i < f.n_mask; i++)
    if (!f.mask[i]) return false;
  for (int64_t s = 0; s < f.layers.rows; s++) {
    const int64_t at = position(f, s) - f.first_position;
    if (f.ids[s] < 0 || f.ids[s] >= f.vocab || at < 0 || at >= f.n_positions) return false;
  }
  return true;
}

// Rows of a table one behind the other.
template <class Row>
void gather(const void* table, int64_t n, int64_t row_bytes, void* to, const Row& row) {
  for (int64_t s = 0; s < n; s++)
    memcpy(static_cast<char*>(to) + s * row_bytes, static_cast<const char*>(table) + row(s) * row_bytes,
           size_t(row_bytes));
}

int compute(Forward& f, int n_threads, char* room) {
  Layers& all = f.layers;
  const Layer& last = *all.layers[all.n_layers - 1];
  const int64_t bytes = last.dtype == F32 ? 4 : 2, row = last.width * bytes;
  const int64_t table_row = last.head_width * (last.turns == PAIRS ? 4 : bytes);
  char *const x = room, *const cosine = x + all.rows * row, *const sine = cosine + all.rows * table_row;
  const auto place = [&](int64_t s) { return position(f, s) - f.first_position; };
  gather(f.embedding, all.rows, row, x, [&](int64_t s) { return f.ids[s]; });
  gather(f.cosines, all.rows, table_row, cosine, place);
  gather(f.sines, all.rows, table_row, sine, place);
  all.x = all.y = x, all.cosine = cosine, all.sine = sine, all.table_stride = last.head_width;
  int64_t* time = f.times + 1;
  *time++ = now_ns();
  const int failed = scheinfer_layers(&all, n_threads);
  f.n_parts = 1 + all.n_done;
  if (failed) return failed;
  for (int64_t i = 0; i < all.n_layers; i++) *time++ = all.layers[i]->times[1], *time++ = all.layers[i]->times[2];
  const int64_t words[] = {reinterpret_cast<int64_t>(f.head), reinterpret_cast<int64_t>(f.head_bias),
                           reinterpret_cast<int64_t>(f.logits), f.n_logits};
  if (const int code = scheinfer_linear(x, all.rows, last.width, 1, words, int(last.dtype), int(last.isa), n_threads))
    return code;
  *time = now_ns();
  f.n_parts++;
  return 0;
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

// 0, or 1 without memory, 2 without that instruction set, 3 with nothing done: a token or a position that is not in the
// tables, a mask that hides something.
extern "C" int scheinfer_forward(Forward* forward, int n_threads) {
  static thread_local Aligned memory;
  Forward& f = *forward;
  f.n_parts = 0, f.times[0] = now_ns();
  if (!is_ours(f)) return NOT_OURS;
  const Layer& first = *f.layers.layers[0];
  try {
    return compute(f, n_threads, memory.at_least(size_t(f.layers.rows * 4 * (first.width + 2 * first.head_width))));
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
