#include "threads.h"

#include <immintrin.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kodalle {
namespace {

constexpr int kSpins = 1000;  // some 20 to 50 us

template <typename T>
void wait_while(std::atomic<T>& value, T old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Helpers sleep between calls and end with the process.
class Pool {
 public:
  Pool() : process_(getpid()) {}
  bool is_of_this_process() const { return process_ == getpid(); }

  // False: another thread has the pool.
  bool try_run(int num_threads, const std::function<void(int, Team&)>& work) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    while (static_cast<int>(helpers_.size()) < num_threads - 1) add_helper();
    Team team(num_threads);
    work_ = &work;
    team_ = &team;
    running_.store(num_threads - 1, std::memory_order_relaxed);
    for (int number = 1; number < num_threads; ++number) {
      helpers_[number - 1]->calls.fetch_add(1, std::memory_order_release);
      helpers_[number - 1]->calls.notify_one();
    }
    work(0, team);
    for (int left; (left = running_.load(std::memory_order_acquire)) != 0;) wait_while(running_, left);
    return true;
  }

 private:
  struct Helper {
    std::atomic<unsigned> calls{0};
  };

  void add_helper() {
    helpers_.push_back(std::make_unique<Helper>());
    const int number = static_cast<int>(helpers_.size());
    std::thread([this, number, helper = helpers_.back().get()] { serve(number, *helper); }).detach();
  }

  void serve(int number, Helper& helper) {
    for (unsigned done = 0;; ++done) {
      wait_while(helper.calls, done);
      (*work_)(number, *team_);
      running_.fetch_sub(1, std::memory_order_acq_rel);
      running_.notify_one();
    }
  }

  const pid_t process_;
  std::mutex busy_;
  std::vector<std::unique_ptr<Helper>> helpers_;
  std::atomic<int> running_{0};
  const std::function<void(int, Team&)>* work_ = nullptr;
  Team* team_ = nullptr;
};

// Never destroyed: helpers may wait in it when the process ends. A forked child has no helpers and makes its own pool.
Pool& pool() {
  static std::mutex mutex;
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  if (found == nullptr || !found->is_of_this_process()) {
    std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    found = current.load(std::memory_order_acquire);
    if (found == nullptr || !found->is_of_this_process()) {
      found = new Pool();
      current.store(found, std::memory_order_release);
    }
  }
  return *found;
}

}  // namespace

void run_together(int num_threads, const std::function<void(int, Team&)>& work) {
  if (num_threads > 1 && pool().try_run(num_threads, work)) return;
  Team alone(1);
  work(0, alone);
}

void Team::wait() {
  if (size_ == 1) return;
  const unsigned round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    round_.notify_all();
  } else {
    wait_while(round_, round);
  }
}

}  // namespace kodalle
