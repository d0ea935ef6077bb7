// What calls of the kernel share: memory that is kept, where rows of activations lie, room for a tile's results.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "kernel.h"

namespace scheinfer {

constexpr int64_t TOKENS_AT_ONCE = 240;  // their activations of one block of K are at most 1 MiB
constexpr int64_t MANY_AT_ONCE = 512;    // of them
constexpr int64_t MOST_ROWS = 64;        // of W in one item of work
constexpr int64_t ENOUGH = 9;            // tokens from which on tiles are faster than rows, beyond steps of few

constexpr size_t LARGE_PAGE = 2 << 20;   // bytes; tiles of a prompt lie in more small pages than a core has at hand

struct Aligned {
  char* data = nullptr;
  size_t size = 0;
  ~Aligned() { free(data); }
  char* at_least(size_t n) {
    if (n > size) {
      free(data);
      const size_t page = n < LARGE_PAGE / 4 ? 4096 : LARGE_PAGE;
      data = static_cast<char*>(aligned_alloc(page, (n + page - 1) / page * page));
      size = data ? n : 0;
      if (!data) throw std::bad_alloc();
      if (page == LARGE_PAGE) madvise(data, (n + page - 1) / page * page, MADV_HUGEPAGE);
    }
    return data;
  }
};

struct Scratch {
  alignas(64) float sums[MOST_STRIPS * STRIP_ROWS * MOST_BLOCKS * SIDE];
  float one[MOST_ROWS * MANY_AT_ONCE], other[MOST_ROWS * MANY_AT_ONCE];
  alignas(64) float wide[SCRATCH];
};
inline Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of activations end in zeros, and begin where no two of them share a set of the cache.
inline int64_t stride_of(int64_t n, int64_t bytes) { return up_to(n, PAD) * bytes + 64; }

inline bool are_many(const Kernels* k, int64_t tokens) { return k->dots_of_many && tokens >= k->many; }
inline auto dots_of(const Kernels* k, int64_t tokens) { return are_many(k, tokens) ? k->dots_of_many : k->dots; }

inline bool by_tiles(const Kernels* k, int64_t tokens) { return k->tiles && tokens >= ENOUGH; }
inline int64_t blocks_of(int64_t tokens) { return (tokens + SIDE - 1) / SIDE; }
inline int64_t tiled_rows_at_once(int64_t n, int n_threads) {  // of W, so that each thread gets several items
  const int64_t share = up_to(n / (4 * n_threads) + 1, STRIP_ROWS), most = MOST_STRIPS * STRIP_ROWS;
  return share < most ? share : most;
}
// Blocks of tokens in as few groups as possible, of sizes as equal as possible: each multiplied at once.
struct Groups {
  int64_t n_blocks;
  explicit Groups(int64_t tokens) : n_blocks(blocks_of(tokens)) {}
  int64_t n() const { return n_blocks ? (n_blocks + MOST_BLOCKS - 1) / MOST_BLOCKS : 1; }
  int64_t first(int64_t i) const { return i * n_blocks / n(); }
};
inline int64_t block_bytes(int64_t n) { return up_to(n, PAD) * SIDE * 2; }

// Tokens in as few chunks as possible, of sizes as equal as possible; all of them many or none.
struct Chunks {
  int64_t tokens, most;
  Chunks(const Kernels* k, int64_t n) : tokens(n), most(are_many(k, n) ? MANY_AT_ONCE : TOKENS_AT_ONCE) {}
  int64_t n() const { return (tokens + most - 1) / most; }
  int64_t first(int64_t i) const { return i * tokens / n(); }
};

// Rows of W in one item of work, so that each thread gets several; whole panels if they are of many tokens.
inline int64_t rows_at_once(int64_t n, int n_threads, bool many, int64_t at_most = MOST_ROWS) {
  const int64_t share = up_to(n / (8 * n_threads) + 1, ROWS), most = many ? PANEL_ROWS : at_most;
  return share < most ? share : most;
}

// Calls work(row) for each of n rows of so many elements, on n_threads threads if that is worth waking them.
template <class Work>
void for_rows(int n_threads, int64_t n, int64_t width, const Work& work) {
  constexpr int64_t WORTH = 1 << 15;  // elements
  const int64_t each = 1 + WORTH / (width + 1);
  struct Context {
    const Work& work;
    int64_t n, each;
  } context{work, n, each};
  parallel(
      n_threads, (n + each - 1) / each,
      [](void* p, int64_t item) {
        const Context& c = *static_cast<const Context*>(p);
        for (int64_t i = item * c.each; i < c.n && i < (item + 1) * c.each; i++) c.work(i);
      },
      &context);
}

// Whether CPU and system let this process multiply by tiles; asks for them.
bool may_use_tiles();

// What scheinfer_attend (step.cpp) is given of all heads.
struct Heads {
  const void *query, *key, *value;
  void* out;
  const int64_t* shape;
  Past past;           // but for sinks
  const float* sinks;  // by head, or null
  int64_t bytes;       // of an element
};

// Whether packing keys and values is worth it, or must be; and attention where it is, which throws std::bad_alloc.
bool are_many_queries(const Kernels* k, const int64_t* shape);
bool has_window(const Heads& heads);
bool may_pack(const Kernels* k, const int64_t* shape);
void attend_prompt(const Kernels* k, const Heads& heads, int n_threads);

// Functions for a dtype of weights; null where this CPU lacks the instruction set or they were not compiled.
const Kernels* kernels(int isa, int dtype);

}  // namespace scheinfer
