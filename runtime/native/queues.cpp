// Queues of tasks that threads of ours work off: an emulated device's CPU and link beside the calling thread.
//
// A thread of Python that is handed a task waits for the interpreter's lock until whoever handed it over sleeps, and
// again when it has ended. Here a layer's tasks are handed over in one call that holds no lock: each queue runs in
// order, a task begins when what it depends on has ended, and whoever ends a task wakes only those who can go on.
// Copies so small that waking their thread would take longer are made by whoever made them possible.
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "rows.h"

extern "C" void scheinfer_copy(const int64_t* pairs, int64_t n_pairs, double bytes_per_s, int64_t chunk);
extern "C" int scheinfer_mlp(const void* x, void* y, int64_t S, int64_t D, int dtype, int act, int isa, int n_threads,
                             int64_t n_experts, const int64_t* experts);

namespace scheinfer {
namespace {

enum Op : int64_t { COPY = 0, MLP = 1, ADD = 2 };
enum State : int64_t { WAITING = 0, DONE = 1, NO_MEMORY = 2, NO_ISA = 3, FOLLOWED = 4, GIVEN_UP = 5 };
constexpr int CALLER = 0, CPU = 1, N_QUEUES = 4;
constexpr uint64_t SLICE_NS = 100000;
constexpr int64_t SMALL = 1 << 15;  // bytes of a copy that is made by whoever made it possible
const char* const NAMES[N_QUEUES] = {"", "scheinfer-cpu", "scheinfer-h2d", "scheinfer-d2h"};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Asks for short slices, so that the calling thread, when it wakes, begins at once on a core that computes: without, it
// waits for the end of the other's slice, a millisecond or so. Kernels before Linux 6.12 take no notice. Who runs the
// process under another policy keeps it.
void ask_for_short_slices() {
  if (sched_getscheduler(0) != SCHED_OTHER) return;
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
  } wish{sizeof(wish), SCHED_OTHER, 0, getpriority(PRIO_PROCESS, 0), 0, SLICE_NS, 0, 0};
  syscall(SYS_sched_setattr, 0, &wish, 0);
}

struct Ticket {
  int64_t state, start_ns, end_ns;
};

struct Job {
  Ticket* ticket;
  const int64_t* op;
  const int64_t* deps;
  int64_t n_deps;
};

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// to += other, rounded after each, in rows of at most what scratch holds. op: dtype, isa, n, to, n_others, others.
int add(const int64_t* op) {
  constexpr int64_t MOST = MOST_ROWS * TOKENS_AT_ONCE;
  const Kernels* k = kernels(int(op[1]), int(op[0]));
  if (!k) return 2;
  Scratch& s = scratch();
  const int64_t size = op[0] == F32 ? 4 : 2;
  for (int64_t first = 0; first < op[2]; first += MOST) {
    const int64_t n = op[2] - first < MOST ? op[2] - first : MOST;
    char* to = at<char>(op[3]) + first * size;
    for (int64_t o = 0; o < op[4]; o++) {
      k->widen_row(to, n, s.one);
      k->widen_row(at<char>(op[5 + o]) + first * size, n, s.other);
      for (int64_t i = 0; i < n; i++) s.one[i] += s.other[i];
      k->store_row(s.one, n, to);
    }
  }
  return 0;
}

int perform(const int64_t* op) {
  if (op[0] == ADD) return add(op + 1);
  if (op[0] == MLP)
    return scheinfer_mlp(at<void>(op[1]), at<void>(op[2]), op[3], op[4], int(op[5]), int(op[6]), int(op[7]), int(op[8]),
                         op[9], op + 10);
  scheinfer_copy(op + 4, op[3], double(op[1]), op[2]);
  return 0;
}

bool is_small(const Job& job) {
  if (job.op[0] != COPY) return false;
  int64_t total = 0;
  for (int64_t i = 0; i < job.op[3]; i++) total += job.op[4 + 3 * i + 2];
  return total <= SMALL;
}

bool has_ended(const Job& job) {
  for (int64_t i = 0; i < job.n_deps; i++)
    if (at<Ticket>(job.deps[i])->state == WAITING) return false;
  return true;
}

bool can_run(const Job& job) {
  for (int64_t i = 0; i < job.n_deps; i++)
    if (at<Ticket>(job.deps[i])->state != DONE) return false;
  return true;
}

class Queues {
 public:
  Queues(const int64_t* cores, int64_t n_cpu, int64_t n_cores) : owner_(getpid()) {
    for (int i = CPU; i < N_QUEUES; i++) {
      cpu_set_t own;
      CPU_ZERO(&own);
      for (int64_t c = 0; c < (i == CPU ? n_cpu : n_cores); c++) CPU_SET(int(cores[c]), &own);
      try {
        queues_[i].thread = std::thread([this, i, own] { serve(i, own); });
      } catch (const std::system_error&) {
        end();
        throw;
      }
    }
  }
  ~Queues() { end(); }

  bool forked() const { return owner_ != getpid(); }

  // Appends tasks: queue, ticket, op, n_deps, deps. Those of CALLER are run here, in order; returns when they and the
  // last of all have ended, or, where none is the caller's and `wait` is 0, at once.
  void run(const int64_t* words, int64_t n_tasks, bool wait) {
    std::unique_lock<std::mutex> lock(mutex_);
    const Ticket* last = nullptr;
    for (int64_t i = 0; i < n_tasks; i++, words += 4 + words[3]) {
      queues_[words[0]].jobs.push_back({at<Ticket>(words[1]), at<const int64_t>(words[2]), words + 4, words[3]});
      last = at<Ticket>(words[1]);
    }
    advance(lock);
    Queue& own = queues_[CALLER];
    while (!own.jobs.empty()) {
      own.wake.wait(lock, [&] { return can_begin(own); });
      work(own, lock);
      advance(lock);
    }
    if (wait && last) own.wake.wait(lock, [&] { return last->state != WAITING; });
  }

  // Returns when nothing is queued or at work; give_up: what has not begun never will.
  void rest(bool give_up) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (Queue& queue : queues_) {
      if (!give_up) continue;
      for (Job& job : queue.jobs) job.ticket->state = GIVEN_UP;
      queue.jobs.clear();
    }
    queues_[CALLER].wake.wait(lock, [&] {
      for (const Queue& queue : queues_)
        if (queue.busy || !queue.jobs.empty()) return false;
      return true;
    });
  }

 private:
  struct Queue {
    std::deque<Job> jobs;
    std::condition_variable wake;
    std::thread thread;
    bool busy = false;
  };

  static bool can_begin(const Queue& queue) {
    return !queue.busy && !queue.jobs.empty() && has_ended(queue.jobs.front());
  }

  void work(Queue& queue, std::unique_lock<std::mutex>& lock) {
    const Job job = queue.jobs.front();
    queue.jobs.pop_front();
    queue.busy = true;
    const bool runs = can_run(job);
    lock.unlock();
    const int64_t start_ns = now_ns();
    const int failed = runs ? perform(job.op) : 0;
    const int64_t end_ns = now_ns();
    lock.lock();
    *job.ticket = {runs ? DONE + failed : FOLLOWED, start_ns, end_ns};
    queue.busy = false;
  }

  // After a change: makes small copies, then wakes who can go on.
  void advance(std::unique_lock<std::mutex>& lock) {
    for (bool again = true; again;) {
      again = false;
      for (int i = CPU + 1; i < N_QUEUES; i++)
        if (can_begin(queues_[i]) && is_small(queues_[i].jobs.front())) work(queues_[i], lock), again = true;
    }
    for (int i = CPU; i < N_QUEUES; i++)
      if (can_begin(queues_[i])) queues_[i].wake.notify_one();
    queues_[CALLER].wake.notify_all();
  }

  void serve(int index, cpu_set_t cores) {
    pthread_setname_np(pthread_self(), NAMES[index]);
    if (CPU_COUNT(&cores)) sched_setaffinity(0, sizeof(cores), &cores);
    if (index != CPU) ask_for_short_slices();
    Queue& own = queues_[index];
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      own.wake.wait(lock, [&] { return ending_ || can_begin(own); });
      if (!can_begin(own)) return;
      work(own, lock);
      advance(lock);
    }
  }

  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    for (Queue& queue : queues_) queue.wake.notify_all();
    for (Queue& queue : queues_)
      if (queue.thread.joinable()) queue.thread.join();
  }

  const pid_t owner_;
  std::mutex mutex_;
  Queue queues_[N_QUEUES];
  bool ending_ = false;
};

}  // namespace
}  // namespace scheinfer

using namespace scheinfer;

extern "C" {

// Starts the threads of CPU, H2D and D2H; the first n_cpu of the cores are the CPU's. Null if that fails.
void* scheinfer_queues_open(const int64_t* cores, int64_t n_cpu, int64_t n_cores) {
  try {
    return new Queues(cores, n_cpu, n_cores);
  } catch (const std::exception&) {
    return nullptr;
  }
}

// 0, 1 without memory, 2 in a process that was forked and has no such threads. See Queues::run.
int scheinfer_queues_run(void* queues, const int64_t* words, int64_t n_tasks, int wait) {
  Queues& own = *static_cast<Queues*>(queues);
  if (own.forked()) return 2;
  try {
    own.run(words, n_tasks, wait != 0);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// See Queues::rest.
void scheinfer_queues_rest(void* queues, int give_up) {
  Queues& own = *static_cast<Queues*>(queues);
  if (!own.forked()) own.rest(give_up != 0);
}

// Ends the threads after what they are at. In a forked process they were never there.
void scheinfer_queues_close(void* queues) {
  Queues* own = static_cast<Queues*>(queues);
  if (!own->forked()) delete own;
}

// What a task of a queue does, on the calling thread; as scheinfer_mlp tells.
int scheinfer_perform(const int64_t* op) { return perform(op); }
}
