// A yardstick: reading memory and doing nothing else, on the threads that compute MLPs.
#include <atomic>
#include <cstring>

#include "kernel.h"

namespace scheinfer {
namespace {

typedef uint64_t Eight __attribute__((vector_size(64)));
constexpr int64_t CHUNK = 1 << 19;

struct Reading {
  const char* from;
  int64_t n_bytes;
  std::atomic<uint64_t> sum;
};

void read_chunk(void* context, int64_t index) {
  Reading& reading = *static_cast<Reading*>(context);
  const char* p = reading.from + index * CHUNK;
  const char* end = p + (reading.n_bytes - index * CHUNK < CHUNK ? reading.n_bytes - index * CHUNK : CHUNK);
  Eight sums[4] = {};
  for (; p + sizeof(sums) <= end; p += sizeof(sums)) {
    Eight read[4];
    memcpy(read, p, sizeof(read));
    for (int i = 0; i < 4; i++) sums[i] ^= read[i];
  }
  uint64_t sum = 0;
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 8; lane++) sum ^= sums[i][lane];
  reading.sum.fetch_xor(sum, std::memory_order_relaxed);
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

// Reads n_bytes (the last few up to 255 are left out); what it returns keeps the compiler from leaving out the rest.
extern "C" uint64_t scheinfer_read(const void* from, int64_t n_bytes, int n_threads) {
  Reading reading{static_cast<const char*>(from), n_bytes, {0}};
  parallel(n_threads, (n_bytes + CHUNK - 1) / CHUNK, read_chunk, &reading);
  return reading.sum.load();
}
