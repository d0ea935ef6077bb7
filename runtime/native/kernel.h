// What the parts of the native kernel share: one set of functions per instruction set, and the thread pool.
//
// Letters: S rows (tokens) of x, D model width, C columns of a piece, K length of a dot product.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace scheinfer {

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };
enum Act : int { SILU = 0, GELU_TANH = 1, GELU_ERF = 2, CLAMPED_GLU = 3 };
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX_BF16 = 4, N_ISA = 5 };

constexpr int ROWS = 4;      // rows of W that a tile takes at once; work is cut at multiples of it
constexpr int PAD = 32;      // activations are padded with zeros to a multiple of it
constexpr int64_t PANEL_ROWS = 48, PANEL_K = 2048;  // of W, side by side for many tokens
constexpr int SCRATCH = PANEL_ROWS * PANEL_K / 2;   // floats that dots() may use to widen weights or lay them out

constexpr int64_t PAST_AT_ONCE = 256;  // keys that one item of attention takes

constexpr int64_t BLOCK_KEYS = 64;   // keys of a prompt's attention that are packed together
constexpr int64_t SPAN_KEYS = 256;   // between two looks at the highest score
constexpr int64_t MOST_WIDTH = 256;  // of a prompt's heads

constexpr int64_t NO_WINDOW = INT64_MAX / 2;  // that much can be taken from any position

// Keys and values of one head: widths and distances of rows, in elements; what scores are multiplied by; a score beside
// those of keys, of a value of zero (or none); how many keys a query sees at most, the last one its own.
struct Past {
  int64_t key_width, value_width, key_stride, value_stride;
  float scale, sink = -INFINITY;
  int64_t window = NO_WINDOW;
};

// A query of one head over keys that lie as they are: how many of them it sees, at least one and at most PAST_AT_ONCE;
// room for the sum of exp(score - top) * value, and for top and the sum of exp(score - top).
struct Seeing {
  const float* query;
  int64_t n;
  float *mixed, *top_and_sum;
};

// One KV head's keys and values, packed in blocks; bytes of a block of each, and of 64 columns of values.
struct Blocks {
  const char *keys, *values;
  int64_t key_bytes, value_bytes, panel_bytes;
};

constexpr int64_t SIDE = 16;                         // rows of W, or tokens, of a tile
constexpr int64_t STRIP_ROWS = 32, STRIP_K = 512;    // of W, multiplied at once by tiles: 32 KiB
constexpr int64_t MOST_STRIPS = 8, MOST_BLOCKS = 16; // of rows, and of SIDE tokens, whose sums stay in the second cache
constexpr int FINISHES = 2;                          // parts in which a block's sums are finished

// Up to 32 rows of W, in two halves of up to 16 neighbours.
struct Strip {
  const char* w[2];
  int64_t rows[2];
};

// Tokens lie in blocks of SIDE, packed as [STRIP_K of K][block][pair of K][token] with zeros up to a multiple of PAD: what
// is multiplied at once lies side by side, and so in different sets of the cache, whatever K is. Bytes before a block's
// tokens from k on.
inline int64_t packed_at(int64_t k, int64_t K, int64_t block, int64_t n_blocks) {
  const int64_t k0 = k / STRIP_K * STRIP_K, left = (K + PAD - 1) / PAD * PAD - k0;
  return (k0 * n_blocks + block * (left < STRIP_K ? left : STRIP_K) + k - k0) * SIDE * 2;
}

// Packed tokens times strips.
struct StripProduct {
  const Strip* strips;
  int64_t n_strips;  // at most MOST_STRIPS
  Strip next;        // what is needed then, to be fetched; no rows if that is not known
  int64_t K, next_K;
  const char* x;                           // the first of all blocks
  int64_t all_blocks, block, n_blocks;     // of x; the first and how many are multiplied, at most MOST_BLOCKS
  float *sums, *copy;  // room for n_strips * n_blocks * SIDE * STRIP_ROWS, for STRIP_ROWS * STRIP_K / 2
  // A part of what becomes of a block's sums, [row of the strip][token].
  void (*finish)(const void* context, int64_t strip, int64_t block, int part, const float* sums);
  const void* context;
};

// Products of bfloat16 by tiles. Rows of a strip beyond those there are have sums of zero.
struct TileKernels {
  // Up to SIDE tokens' rows as a block of those at x; zeros for what is missing.
  void (*pack)(const void* const* rows, int64_t n_rows, int64_t K, int64_t block, int64_t n_blocks, void* x);
  void (*multiply)(const StripProduct& product);
  // A part of a strip of gate and up rows: columns of h as 16 pairs of a block; zeros from n columns on. bias: what is
  // added to each of the strip's rows, or null.
  void (*activate)(const float* sums, int part, int64_t n, int act, const float* bias, void* pairs);
  // Adds a part of n_rows of a strip to rows of sums, times their weights (ones if null).
  void (*add)(const float* sums, int part, int64_t n_rows, int64_t n_tokens, const float* weights, float* const* rows);
  // A part of sums plus bias, rounded.
  void (*store)(const float* sums, int part, int64_t n_rows, int64_t n_tokens, const float* bias, char* y,
                int64_t stride);
};

// Activations lie in rows of float, or of bfloat16 where the instruction set multiplies pairs of it.
struct Kernels {
  // out[t * out_stride + r] = sum over k of w[r][k] * x[t][k]; w has rows of K weights without gaps. later: as many
  // rows that are needed next, or null.
  void (*dots)(const void* w, int64_t rows, int64_t K, const void* const* x, int64_t tokens, float* out,
               int64_t out_stride, const void* later, float* scratch);
  // One row of activations, n values and zeros up to a multiple of PAD, from weights' dtype.
  void (*load_row)(const void* from, int64_t n, void* to);
  // to[i] = act(gate[i]) * up[i], or what CLAMPED_GLU makes of both, as activations.
  void (*activate)(const float* gate, const float* up, int64_t n, int act, void* to);
  void (*store_row)(const float* from, int64_t n, void* to);
  void (*widen_row)(const void* from, int64_t n, float* to);
  void (*norm_row)(const void* from, const void* weight, int64_t n, float eps, void* to);
  void (*norm_row_once)(const void* from, const void* weight, int64_t n, float eps, void* to);  // rounds no earlier
  void (*layer_norm_row)(const void* from, const void* weight, const void* bias, int64_t n, float eps, void* to);
  void (*add_row)(const void* one, const void* other, int64_t n, void* to);
  void (*turn_row)(void* values, const void* cosine, const void* sine, int64_t n);
  void (*attend_few)(const Seeing* rows, int64_t n_rows, const void* keys, const void* values, const Past& past);
  // sum[i] = sum over n rows of weights[r] * w[r][i]; rows of K weights without gaps.
  void (*weigh_rows)(const void* w, int64_t n, int64_t K, const float* weights, float* sum);
  int activation_bytes;
  // What dots computes, of many tokens; sums are in another order. Null where dots is as fast.
  decltype(dots) dots_of_many = nullptr;
  int64_t many = 0;                    // tokens from which on it is faster
  const TileKernels* tiles = nullptr;  // of many tokens, too; null where the instruction set has none
  // A prompt's attention; null without AVX-512. Blocks of keys and values, up to so many neighbouring queries of a head.
  int attends_at_once = 6;
  int64_t few_queries = 0;  // of a KV head, in several tokens, that are as fast over keys as they lie
  void (*pack_keys)(const void* keys, int64_t n_keys, const Past& past, void* panel) = nullptr;
  void (*pack_values)(const void* values, int64_t n_keys, const Past& past, void* panel) = nullptr;
  void (*attend_rows)(int n, const Blocks& blocks, const void* const* queries, int64_t position, const Past& past,
                      void* const* out) = nullptr;
};

// Functions of an instruction set for a dtype of weights; null where they were not compiled.
const Kernels* portable_kernels(int dtype);
const Kernels* avx2_kernels(int dtype);
const Kernels* avx512_kernels(int dtype);
const Kernels* avx512_bf16_kernels(int dtype);
const Kernels* amx_bf16_kernels(int dtype);

// Calls work(context, i) for i = 0..n_items-1 on n_threads threads, the caller one of them; returns when all are done. Each
// begins with neighbouring items, the same share of them in every call.
void parallel(int n_threads, int64_t n_items, void (*work)(void* context, int64_t item), void* context);

// Whether the calling thread's workers wait awake for its next call, for up to a millisecond.
void stay_awake(bool awake);

// Ends the calling thread's workers.
void end_workers();

}  // namespace scheinfer
