// A yardstick: reading memory and doing nothing else, on the threads that compute MLPs.
#include <atomic>
#include <cstring>

#include "kernel.h"

namespace scheinfer {
namespace {

typedef uint64_t Eight __attribute__((vector_size(64)));
constexpr int64_t AHEAD = 2048;  // bytes; as far as a tile of one token fetches (tile.h)
constexpr int64_t CHUNK = 1 << 19;

struct Reading {
  const char* from;
  int64_t n_bytes;
  std::atomic<uint64_t> sum;
};

// Four streams, each fetched ahead, at their end the beginnings of the next chunk's: the fastest of several ways to read.
void read_chunk(void* context, int64_t index) {
  Reading& reading = *static_cast<Reading*>(context);
  const int64_t left = reading.n_bytes - index * CHUNK, stride = (left < CHUNK ? left : CHUNK) / 256 * 64;
  const char *p = reading.from + index * CHUNK, *ahead = p + AHEAD;
  const bool follows = left >= 2 * CHUNK;
  Eight sums[4] = {};
  for (int64_t at = 0; at < stride; at += 64) {
    if (at == stride - AHEAD && follows) ahead = p + CHUNK - at;
    for (int i = 0; i < 4; i++) {
      Eight read;
      __builtin_prefetch(ahead + i * stride + at);
      memcpy(&read, p + i * stride + at, sizeof(read));
      sums[i] ^= read;
    }
  }
  uint64_t sum = 0;
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 8; lane++) sum ^= sums[i][lane];
  reading.sum.fetch_xor(sum, std::memory_order_relaxed);
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

// Reads n_bytes (of the last few, up to 255 may be left out); what it returns keeps the compiler from leaving out the rest.
extern "C" uint64_t scheinfer_read(const void* from, int64_t n_bytes, int n_threads) {
  Reading reading{static_cast<const char*>(from), n_bytes, {0}};
  parallel(n_threads, (n_bytes + CHUNK - 1) / CHUNK, read_chunk, &reading);
  return reading.sum.load();
}
