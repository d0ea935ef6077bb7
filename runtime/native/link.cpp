// The emulated link: copies that keep to a rate, as a copy engine's do.
//
// Beside a device's kernels a copy engine takes no interpreter lock and no cache. So pacing is done here, where the
// caller holds no lock, and what is large goes past the caches.
#include <sys/prctl.h>
#include <time.h>

#include <cstring>

#include "kernel.h"
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace scheinfer {
namespace {

constexpr double OVERSHOOT_S = 6e-5;  // what a sleep lasts too long, nine times in ten (virtual machines: 20 to 50 us)
constexpr int64_t LARGE = 1 << 18;  // what is smaller is used next, and stays in the caches

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

void sleep_until(double at_s) {
  timespec t;
  t.tv_sec = time_t(at_s);
  t.tv_nsec = long((at_s - double(t.tv_sec)) * 1e9);
  while (now_s() < at_s && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr) != 0) {
  }
}

void copy_past_caches(char* to, const char* from, int64_t n) {
#if defined(__x86_64__)
  const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to) & 63);
  if (n < head + 64) {
    memcpy(to, from, size_t(n));
    return;
  }
  memcpy(to, from, size_t(head));
  int64_t at = head;
  for (; at + 64 <= n; at += 64) {
    const __m128i* line = reinterpret_cast<const __m128i*>(from + at);
    __m128i* out = reinterpret_cast<__m128i*>(to + at);
    const __m128i a = _mm_loadu_si128(line), b = _mm_loadu_si128(line + 1);
    const __m128i c = _mm_loadu_si128(line + 2), d = _mm_loadu_si128(line + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  memcpy(to + at, from + at, size_t(n - at));
  _mm_sfence();
#else
  memcpy(to, from, size_t(n));
#endif
}

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

// Copies n_pairs of (to, from, bytes), chunk by chunk, never more than a short sleep ahead of bytes_per_s, in all as
// long as they take at that rate.
extern "C" void scheinfer_copy(const int64_t* pairs, int64_t n_pairs, double bytes_per_s, int64_t chunk) {
  const double start_s = now_s();
  int64_t total = 0, done = 0;
  for (int64_t i = 0; i < n_pairs; i++) total += pairs[3 * i + 2];
  prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);  // sleeps that add no step of their own to short copies
  for (int64_t i = 0; i < n_pairs; i++) {
    char* to = reinterpret_cast<char*>(pairs[3 * i]);
    const char* from = reinterpret_cast<const char*>(pairs[3 * i + 1]);
    const int64_t size = pairs[3 * i + 2];
    for (int64_t first = 0; first < size; first += chunk) {
      const int64_t n = size - first < chunk ? size - first : chunk;
      if (total < LARGE) memcpy(to + first, from + first, size_t(n));
      else copy_past_caches(to + first, from + first, n);
      done += n;
      const double due_s = start_s + double(done) / bytes_per_s;
      sleep_until(due_s - OVERSHOOT_S);
      while (done == total && now_s() < due_s) {  // awake and not yielding: who yields to a busy core waits for its slice
      }
    }
  }
}
