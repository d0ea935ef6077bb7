// Workers of a calling thread: they end with it, sleep between calls, and each stays on its own core. Each takes its own share
// of the items, neighbours, and then what is left of others': what one wrote in one call it finds in its caches in the
// next, if both go by the same rows. Where the caller
// says that the cores are its alone they stay awake for a while after a call: waking one up takes as long as a small
// projection, the more so on a virtual machine.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "kernel.h"

namespace scheinfer {
namespace {

constexpr auto SPIN = std::chrono::microseconds(4), AWAKE = std::chrono::microseconds(1000);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class Condition>
bool soon(Condition condition, const std::atomic<bool>& awake) {
  const auto since = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 16; i++) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() - since < (awake.load(std::memory_order_relaxed) ? AWAKE : SPIN));
  return condition();
}

bool same(const cpu_set_t& one, const cpu_set_t& other) { return CPU_EQUAL(&one, &other); }

class Pool {
 public:
  Pool(int n_threads, const cpu_set_t& cores)
      : n_threads_(n_threads), cores_(cores), owner_(getpid()), shares_(size_t(n_threads)) {
    CPU_ZERO(&taken_);
    std::vector<int> free;
    const int own = sched_getcpu();
    for (int core = 0; core < CPU_SETSIZE; core++)
      if (core != own && CPU_ISSET(core, &cores)) free.push_back(core);
    const bool pinned = CPU_COUNT(&cores) >= n_threads && int(free.size()) >= n_threads - 1;
    for (int i = 1; i < n_threads; i++) {
      const int core = pinned ? free[size_t(i - 1)] : -1;
      if (pinned) CPU_SET(core, &taken_);
      try {
        workers_.emplace_back([this, i, core] { serve(i, core); });
      } catch (const std::system_error&) {
        break;  // fewer threads compute the same
      }
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
      job_.fetch_add(1);
    }
    called_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  bool fits(int n_threads, const cpu_set_t& cores) const { return n_threads == n_threads_ && same(cores, cores_); }
  bool forked() const { return owner_ != getpid(); }
  void stay_awake(bool awake) { awake_.store(awake, std::memory_order_relaxed); }

  void run(int64_t n_items, void (*work)(void*, int64_t), void* context) {
    const bool moved = step_aside();
    work_ = work, context_ = context;
    for (int64_t i = 0; i < n_threads_; i++) {
      shares_[size_t(i)].next.store(i * n_items / n_threads_, std::memory_order_relaxed);
      shares_[size_t(i)].end = (i + 1) * n_items / n_threads_;
    }
    busy_.store(int(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_.fetch_add(1);
    }
    called_.notify_all();
    take_items(0);
    const auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
    if (!soon(done, awake_)) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, done);
    }
    if (moved) sched_setaffinity(0, sizeof(cores_), &cores_);
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // A worker woken on the core that its caller runs on would wait for it: the caller leaves workers' cores.
  bool step_aside() const {
    const int core = sched_getcpu();
    if (core < 0 || !CPU_ISSET(core, &taken_)) return false;
    cpu_set_t others;
    CPU_XOR(&others, &cores_, &taken_);
    return sched_setaffinity(0, sizeof(others), &others) == 0;
  }

  void take_items(int own) {
    for (int n = 0; n < n_threads_; n++) {
      Share& share = shares_[size_t((own + n) % n_threads_)];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) work_(context_, i);
    }
  }

  void serve(int own, int core) {
    pthread_setname_np(pthread_self(), "scheinfer-mlp");
    if (core >= 0) {
      cpu_set_t own;
      CPU_ZERO(&own);
      CPU_SET(core, &own);
      sched_setaffinity(0, sizeof(own), &own);
    }
    for (uint64_t seen = 0;;) {
      const auto called = [this, seen] { return job_.load(std::memory_order_acquire) != seen; };
      if (!soon(called, awake_)) {
        std::unique_lock<std::mutex> lock(mutex_);
        called_.wait(lock, called);
      }
      seen = job_.load(std::memory_order_acquire);
      if (ending_) return;
      take_items(own);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  const int n_threads_;
  const cpu_set_t cores_;
  const pid_t owner_;
  cpu_set_t taken_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable called_, finished_;
  std::atomic<uint64_t> job_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> awake_{false};
  bool ending_ = false;
  void (*work_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::vector<Share> shares_;
};

thread_local std::unique_ptr<Pool> own_pool;
thread_local bool own_awake = false;

Pool& pool_of(int n_threads) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof(cores), &cores);
  if (own_pool && own_pool->forked()) (void)own_pool.release();  // its threads stayed with the parent
  if (!own_pool || !own_pool->fits(n_threads, cores)) {
    own_pool.reset();
    own_pool = std::make_unique<Pool>(n_threads, cores);
    own_pool->stay_awake(own_awake);
  }
  return *own_pool;
}

}  // namespace

void parallel(int n_threads, int64_t n_items, void (*work)(void*, int64_t), void* context) {
  if (n_threads <= 1 || n_items <= 1) {
    for (int64_t i = 0; i < n_items; i++) work(context, i);
    return;
  }
  pool_of(n_threads).run(n_items, work, context);
}

void stay_awake(bool awake) {
  own_awake = awake;
  if (own_pool && !own_pool->forked()) own_pool->stay_awake(awake);
}

void end_workers() {
  if (own_pool && own_pool->forked()) (void)own_pool.release();
  own_pool.reset();
}

}  // namespace scheinfer
