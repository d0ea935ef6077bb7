// One call: the parts of a layer's MLPs or experts that the CPU computes, for all rows at once.
//
//   h[t][c] = act(x[t] . gate[c]) * (x[t] . up[c])          for every piece, biases added to both products, columns shared out between threads
//   y[row(t)][d] += weight(t) * (h[t] . down[d])            rows of down shared out; experts in the order given
//
// Sums are float32 from weights to y, which is rounded once. Activations h are float32, or bfloat16 where the CPU
// multiplies bfloat16. Experts of enough rows are multiplied by tiles where the CPU has them: their rows of x and h lie in
// packed blocks then.
#include <algorithm>

#include "mlp.h"

extern "C" int scheinfer_has(int isa);

namespace scheinfer {
namespace {

// -- by rows ---------------------------------------------------------------------------------------------------------

void gate_and_up(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  const Item& item = call.items[size_t(index)];
  if (item.expert->tiled) return gate_and_up_by_tiles(call, index);
  const Piece& piece = *item.piece;
  Scratch& s = scratch();
  const int64_t n = item.last - item.first, row_bytes = call.D * call.weight_bytes;
  const int64_t size = call.k->activation_bytes, end = item.last == piece.columns ? up_to(item.last, PAD) : item.last;
  const Chunks chunks(call.k, item.expert->n_rows);
  const auto dots = dots_of(call.k, item.expert->n_rows);
  float bias[2 * MOST_ROWS];
  const float* const more = bias_of(call, piece, item.first, n, bias);
  for (int64_t i = 0; i < chunks.n(); i++) {
    const int64_t t0 = chunks.first(i), tokens = chunks.first(i + 1) - t0;
    const void* const* x = item.expert->x.data() + t0;
    const char *gate = piece.gate + item.first * row_bytes, *up = piece.up + item.first * row_bytes;
    dots(gate, n, call.D, x, tokens, s.one, MOST_ROWS, i ? nullptr : up, s.wide);
    dots(up, n, call.D, x, tokens, s.other, MOST_ROWS, i + 1 < chunks.n() ? nullptr : after(call, index), s.wide);
    for (int64_t t = 0; t < tokens; t++) {
      char* to = piece.h + (t0 + t) * piece.stride + item.first * size;
      for (int64_t i = 0; more && i < n; i++) s.one[t * MOST_ROWS + i] += more[i], s.other[t * MOST_ROWS + i] += more[n + i];
      call.k->activate(s.one + t * MOST_ROWS, s.other + t * MOST_ROWS, n, call.act, to);
      for (char* p = to + n * size; p < to + (end - item.first) * size; p++) *p = 0;
    }
  }
}

// Adds to sums [S, n].
void add_down(const Call& call, const Expert& expert, const Piece& piece, int64_t first, int64_t n, float* sums,
              const char* later) {
  Scratch& s = scratch();
  const char* down = piece.down + first * piece.columns * call.weight_bytes;
  const Chunks chunks(call.k, expert.n_rows);
  const auto dots = dots_of(call.k, expert.n_rows);
  for (int64_t i = 0; i < chunks.n(); i++) {
    const int64_t t0 = chunks.first(i), tokens = chunks.first(i + 1) - t0;
    const void* h[MANY_AT_ONCE];
    for (int64_t t = 0; t < tokens; t++) h[t] = piece.h + (t0 + t) * piece.stride;
    dots(down, n, piece.columns, h, tokens, s.one, n, i + 1 < chunks.n() ? nullptr : later, s.wide);
    for (int64_t t = 0; t < tokens; t++) {
      float* sum = sums + (expert.rows ? expert.rows[t0 + t] : t0 + t) * n;
      const float weight = expert.weights ? expert.weights[t0 + t] : 1.0f, *part = s.one + t * n;
      for (int64_t i = 0; i < n; i++) sum[i] += weight * part[i];
    }
  }
}

void down(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t first = index * call.at_once, left = call.D - first;
  const int64_t n = left < call.at_once ? left : call.at_once;
  float* sums = call.sums + call.S * first;
  std::fill_n(sums, call.S * n, 0.0f);  // of no tokens there is no memory
  for (size_t e = 0; e < call.parts.size(); e++) {
    const Part &part = call.parts[e], &then = call.parts[(e + 1) % call.parts.size()];
    const int64_t row = e + 1 < call.parts.size() ? first : first + call.at_once;
    if (part.expert->tiled) {
      add_down_by_tiles(call, part, then, first, row, n, sums);
      continue;
    }
    const bool follows = then.piece->columns == part.piece->columns && row + n <= call.D;
    const char* later = follows ? then.piece->down + row * then.piece->columns * call.weight_bytes : nullptr;
    add_down(call, *part.expert, *part.piece, first, n, sums, later);
  }
  for (int64_t s = 0; s < call.S; s++)
    call.k->store_row(sums + s * n, n, call.y + (s * call.D + first) * call.weight_bytes);
}

// Experts as callers lay them down: rows, weights, n_rows, n_pieces, then gate, up, down, columns and bias of each piece.
// Rows of x lie in `rows`, padded, but those of experts by tiles in x itself until they are packed.
void read_experts(Call& call, const int64_t* words, int64_t n_experts, const char* x, const char* rows, int64_t stride) {
  call.experts.resize(size_t(n_experts));
  for (Expert& expert : call.experts) {
    expert.rows = reinterpret_cast<const int64_t*>(words[0]);
    expert.weights = reinterpret_cast<const float*>(words[1]);
    expert.n_rows = words[2];
    expert.pieces.resize(size_t(words[3]));
    words += 4;
    for (Piece& piece : expert.pieces) {
      piece.gate = reinterpret_cast<const char*>(words[0]);
      piece.up = reinterpret_cast<const char*>(words[1]);
      piece.down = reinterpret_cast<const char*>(words[2]);
      piece.columns = words[3];
      piece.bias = reinterpret_cast<const char*>(words[4]);
      words += 5;
    }
    expert.tiled = by_tiles(call.k, expert.n_rows);
    const char* from = expert.tiled ? x : rows;
    const int64_t apart = expert.tiled ? call.D * call.weight_bytes : stride;
    for (int64_t t = 0; t < expert.n_rows; t++) expert.x.push_back(from + (expert.rows ? expert.rows[t] : t) * apart);
    for (int64_t i = 0; expert.tiled && i < blocks_of(expert.n_rows); i++) call.blocks.push_back({&expert, i});
  }
}

int64_t size_of_h(const Expert& expert, const Piece& piece) {
  return piece.stride * (expert.tiled ? blocks_of(expert.n_rows) : expert.n_rows);
}

bool all_tiled(const Call& call) {
  for (const Expert& expert : call.experts)
    if (!expert.tiled && expert.n_rows) return false;
  return true;
}

// Rows of down in an item: of one token and small experts more, since reading short streams takes longer (tile.h).
int64_t most_of_down(const Call& call) {
  constexpr int64_t WORTH = 1 << 18;  // bytes
  int64_t longest = MOST_ROWS;
  for (const Part& part : call.parts) {
    if (call.S > 1 || part.expert->n_rows > 1) return MOST_ROWS;  // an expert may name the one row many times
    if (part.piece->columns * call.weight_bytes * longest < WORTH)
      longest = up_to(WORTH / (part.piece->columns * call.weight_bytes + 1) + 1, ROWS);
  }
  return longest < 3 * MOST_ROWS ? longest : 3 * MOST_ROWS;
}

void share_out(Call& call, Memory& memory, int n_threads) {
  size_t total = 0;
  int64_t n_columns = 0;
  bool many = false;
  for (const Expert& expert : call.experts)
    for (const Piece& piece : expert.pieces) n_columns += piece.columns;
  for (Expert& expert : call.experts)
    for (Piece& piece : expert.pieces) {
      piece.stride = expert.tiled ? block_bytes(piece.columns) : stride_of(piece.columns, call.k->activation_bytes);
      total += size_t(size_of_h(expert, piece));
      call.parts.push_back({&expert, &piece});
      const int64_t by_rows = rows_at_once(n_columns, n_threads, are_many(call.k, expert.n_rows));
      const int64_t most = expert.tiled ? MOST_STRIPS * STRIP_ROWS / 2 : by_rows;
      many |= are_many(call.k, expert.n_rows);
      const Groups groups(expert.n_rows);
      for (int64_t g = 0; g == 0 || (expert.tiled && g < groups.n()); g++)
        for (int64_t first = 0; first < piece.columns; first += most) {
          const int64_t last = first + most < piece.columns ? first + most : piece.columns, block = groups.first(g);
          call.items.push_back({&expert, &piece, first, last, block, groups.first(g + 1) - block});
        }
    }
  char* h = memory.h.at_least(total);
  for (Expert& expert : call.experts)
    for (Piece& piece : expert.pieces) piece.h = h, h += size_of_h(expert, piece);
  char* blocks = memory.blocks.at_least(call.blocks.size() * size_t(block_bytes(call.D)));
  for (Expert& expert : call.experts) {
    expert.blocks = blocks;
    if (expert.tiled) blocks += blocks_of(expert.n_rows) * block_bytes(call.D);
  }
  call.at_once = call.blocks.empty() ? rows_at_once(call.D, n_threads, many, most_of_down(call)) : tiled_rows_at_once(call.D, n_threads);
}

}  // namespace

const Kernels* kernels(int isa, int dtype) {
  if (!scheinfer_has(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == AMX_BF16) return amx_bf16_kernels(dtype);
  if (isa == AVX512_BF16) return avx512_bf16_kernels(dtype);
  if (isa == AVX512) return avx512_kernels(dtype);
  if (isa == AVX2) return avx2_kernels(dtype);
#endif
  return isa == PORTABLE ? portable_kernels(dtype) : nullptr;
}

}  // namespace scheinfer

using namespace scheinfer;

extern "C" {

// Counts changes of this interface: a library of other sources is not used.
int scheinfer_interface() { return 17; }

// Whether this CPU has an instruction set.
int scheinfer_has(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == AVX2) return avx2;
  if (isa == AVX512) return avx512;
  if (isa == AVX512_BF16) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == AMX_BF16) return amx_bf16_kernels(BF16) && scheinfer_has(AVX512_BF16) && may_use_tiles();
#endif
  return isa == PORTABLE;
}

// y [S, D] = sum over experts; x and y have the weights' dtype. 0, or 1 without memory, 2 without that instruction set.
int scheinfer_mlp(const void* x, void* y, int64_t S, int64_t D, int dtype, int act, int isa, int n_threads,
                  int64_t n_experts, const int64_t* experts) {
  static thread_local Memory memory;
  try {
    const Kernels* k = kernels(isa, dtype);
    if (!k) return 2;
    const int64_t weight_bytes = dtype == F32 ? 4 : 2, stride = stride_of(D, k->activation_bytes);
    char* rows = memory.x.at_least(size_t(S * stride));
    Call call{k, D, S, weight_bytes, MOST_ROWS, act, static_cast<char*>(y), nullptr, {}, {}, {}, {}};
    call.sums = reinterpret_cast<float*>(memory.sums.at_least(size_t(S * D) * sizeof(float)));
    read_experts(call, experts, n_experts, static_cast<const char*>(x), rows, stride);
    share_out(call, memory, n_threads);
    if (!all_tiled(call)) for_rows(n_threads, S, D, [=](int64_t s) {
        k->load_row(static_cast<const char*>(x) + s * D * weight_bytes, D, rows + s * stride);
      });
    parallel(n_threads, int64_t(call.blocks.size()), pack_block, &call);
    parallel(n_threads, int64_t(call.items.size()), gate_and_up, &call);
    const Expert* only = call.parts.size() == 1 ? call.parts.front().expert : nullptr;
    const bool whole = only && only->tiled && !only->rows && !only->weights && only->n_rows == S;
    const int64_t groups = whole ? Groups(S).n() : 1;
    parallel(n_threads, (D + call.at_once - 1) / call.at_once * groups, whole ? down_of_all : down, &call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Whether the calling thread's workers stay awake for a millisecond after each of its calls.
void scheinfer_stay_awake(int awake) { stay_awake(awake); }

// Ends the calling thread's workers; its next call starts new ones.
void scheinfer_end_workers() { end_workers(); }
}
