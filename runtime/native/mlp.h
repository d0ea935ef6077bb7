// What a call of the kernel's MLPs holds, and its products by tiles.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace scheinfer {
namespace {

struct Piece {
  const char *gate, *up, *down;
  int64_t columns;
  const char* bias;  // of each column's gate, then of each one's up; null: none
  char* h;
  int64_t stride;  // bytes between rows of h
};

struct Expert {
  const int64_t* rows;   // null: all rows in order
  const float* weights;  // null: ones
  int64_t n_rows;
  std::vector<Piece> pieces;
  std::vector<const void*> x;
  bool tiled;
  char* blocks;  // of x, if tiled
};

struct Item {
  const Expert* expert;
  const Piece* piece;
  int64_t first, last;
  int64_t block, n_blocks;  // of tokens, if by tiles
};

struct Part {
  const Expert* expert;
  const Piece* piece;
};

struct Block {  // of an expert's tokens
  const Expert* expert;
  int64_t index;
};

struct Call {
  const Kernels* k;
  int64_t D, S, weight_bytes, at_once;
  int act;
  char* y;
  float* sums;  // [D / at_once][S, at_once]
  std::vector<Expert> experts;
  std::vector<Item> items;
  std::vector<Part> parts;
  std::vector<Block> blocks;
};

struct Memory {  // of a calling thread, kept for its next call
  Aligned x, blocks, h, sums;
};

// The gate of the item that this thread is likely to take next, if it has as many rows; null if not.
const char* after(const Call& call, int64_t index) {
  const int64_t next = index + 1;
  if (next >= int64_t(call.items.size())) return nullptr;
  const Item &now = call.items[size_t(index)], &then = call.items[size_t(next)];
  return then.last - then.first < now.last - now.first ? nullptr : then.piece->gate + then.first * call.D * call.weight_bytes;
}

// Biases of up to n of a piece's columns from the first on, each half of `to` of n: gate's, then up's; null if it has none.
const float* bias_of(const Call& call, const Piece& piece, int64_t first, int64_t n, float* to) {
  if (!piece.bias) return nullptr;
  const int64_t left = piece.columns - first, some = left < n ? left : n;
  if (some < n) std::fill_n(to, 2 * n, 0.0f);
  for (int half = 0; half < 2 && some > 0; half++)
    call.k->widen_row(piece.bias + (half * piece.columns + first) * call.weight_bytes, some, to + half * n);
  return to;
}

// -- by tiles --------------------------------------------------------------------------------------------------------

void pack_block(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  const Block& block = call.blocks[size_t(index)];
  const int64_t first = block.index * SIDE, left = block.expert->n_rows - first;
  call.k->tiles->pack(block.expert->x.data() + first, left < SIDE ? left : SIDE, call.D, block.index,
                      blocks_of(block.expert->n_rows), block.expert->blocks);
}

// Gate and up rows of an item; none if there is no such item, or no tiles are for it.
Strip strip_of(const Call& call, int64_t index, int64_t strip) {
  constexpr int64_t HALF = STRIP_ROWS / 2;
  if (index >= int64_t(call.items.size()) || !call.items[size_t(index)].expert->tiled) return {};
  const Item& item = call.items[size_t(index)];
  const int64_t first = item.first + strip * HALF, left = item.last - first, n = left < HALF ? left : HALF;
  if (n <= 0) return {{item.piece->gate, item.piece->up}, {0, 0}};  // columns of h end in zeros
  const int64_t at = first * call.D * call.weight_bytes;
  return {{item.piece->gate + at, item.piece->up + at}, {n, n}};
}

void gate_and_up_by_tiles(const Call& call, int64_t index) {
  struct Columns {
    const Call& call;
    const Item& item;
  } columns{call, call.items[size_t(index)]};
  const Item& item = columns.item;
  const int64_t n = up_to(item.last - item.first, PAD) / (STRIP_ROWS / 2);
  Strip strips[MOST_STRIPS];
  for (int64_t i = 0; i < n; i++) strips[i] = strip_of(call, index, i);
  Scratch& s = scratch();
  call.k->tiles->multiply({strips, n, strip_of(call, index + 1, 0), call.D, call.D, item.expert->blocks,
                           blocks_of(item.expert->n_rows), item.block, item.n_blocks, s.sums, s.wide,
                           [](const void* context, int64_t strip, int64_t block, int part, const float* sums) {
                             const auto& [call, item] = *static_cast<const Columns*>(context);
                             const int64_t first = item.first + strip * STRIP_ROWS / 2;
                             const int64_t at = packed_at(first, item.piece->columns, item.block + block,
                                                          blocks_of(item.expert->n_rows));
                             float bias[STRIP_ROWS];
                             const float* more = bias_of(call, *item.piece, first, STRIP_ROWS / 2, bias);
                             call.k->tiles->activate(sums, part, item.last - first, call.act, more, item.piece->h + at);
                           },
                           &columns});
}

// Rows of down, n at most; none beyond those there are.
Strip strip_of_down(const Call& call, const Part& part, int64_t first, int64_t n) {
  const int64_t row_bytes = part.piece->columns * call.weight_bytes, half = STRIP_ROWS / 2;
  if (!part.expert->tiled || first >= call.D) return {};
  const char* w = part.piece->down + first * row_bytes;
  const int64_t rows = n < STRIP_ROWS ? n : STRIP_ROWS, some = rows < half ? rows : half;
  return {{w, w + some * row_bytes}, {some, rows - some}};
}

// Adds to sums [S, n].
void add_down_by_tiles(const Call& call, const Part& part, const Part& then, int64_t first, int64_t row, int64_t n,
                       float* sums) {
  struct Rows {
    const Call& call;
    const Expert& expert;
    float* sums;
    int64_t n, block;
  } rows{call, *part.expert, sums, n, 0};
  Scratch& s = scratch();
  const Piece& piece = *part.piece;
  Strip strips[MOST_STRIPS];
  int64_t n_strips = 0;
  for (int64_t r = 0; r < n; r += STRIP_ROWS) strips[n_strips++] = strip_of_down(call, part, first + r, n - r);
  const Groups groups(part.expert->n_rows);
  for (int64_t g = 0; g < groups.n(); g++) {
    rows.block = groups.first(g);
    const bool last = g + 1 == groups.n();
    const Strip next = last ? strip_of_down(call, then, row, call.D - row) : strips[0];
    const int64_t next_K = last ? then.piece->columns : piece.columns;
    call.k->tiles->multiply({strips, n_strips, next, piece.columns, next_K, piece.h, groups.n_blocks, rows.block,
                             groups.first(g + 1) - rows.block, s.sums, s.wide,
                             [](const void* context, int64_t strip, int64_t block, int part, const float* sums) {
                               const Rows& rows = *static_cast<const Rows*>(context);
                               const int64_t t0 = (rows.block + block) * SIDE, left = rows.expert.n_rows - t0;
                               const int64_t n_tokens = left < SIDE ? left : SIDE, r = strip * STRIP_ROWS;
                               float* to[SIDE];
                               for (int64_t t = 0; t < n_tokens; t++)
                                 to[t] = rows.sums + (rows.expert.rows ? rows.expert.rows[t0 + t] : t0 + t) * rows.n + r;
                               const float* weights = rows.expert.weights ? rows.expert.weights + t0 : nullptr;
                               rows.call.k->tiles->add(sums, part, rows.n - r, n_tokens, weights, to);
                             },
                             &rows});
  }
}

// A tile product's share of y itself, where there is nothing to add.
void down_of_all(void* context, int64_t index) {
  struct Rows {
    const Call& call;
    int64_t first, n, block;
  };
  const Call& call = *static_cast<const Call*>(context);
  const Part& part = call.parts.front();
  const Groups groups(call.S);
  const int64_t n_shares = (call.D + call.at_once - 1) / call.at_once, first = index % n_shares * call.at_once;
  const int64_t all = call.D - first, next = (index + 1) % n_shares * call.at_once, g = index / n_shares;
  Rows rows{call, first, all < call.at_once ? all : call.at_once, groups.first(g)};
  Scratch& s = scratch();
  Strip strips[MOST_STRIPS];
  int64_t n = 0;
  for (int64_t r = 0; r < rows.n; r += STRIP_ROWS) strips[n++] = strip_of_down(call, part, first + r, rows.n - r);
  call.k->tiles->multiply({strips, n, strip_of_down(call, part, next, call.D - next), part.piece->columns,
                           part.piece->columns, part.piece->h, groups.n_blocks, rows.block,
                           groups.first(g + 1) - rows.block, s.sums, s.wide,
                           [](const void* context, int64_t strip, int64_t block, int part, const float* sums) {
                             static constexpr float none[STRIP_ROWS] = {};
                             const auto& [call, first, n, from] = *static_cast<const Rows*>(context);
                             const int64_t t = (from + block) * SIDE, r = strip * STRIP_ROWS, left = call.S - t;
                             char* y = call.y + (t * call.D + first + r) * call.weight_bytes;
                             call.k->tiles->store(sums, part, n - r, left < SIDE ? left : SIDE, none, y,
                                                  call.D * call.weight_bytes);
                           },
                           &rows});
}

}  // namespace
}  // namespace scheinfer
