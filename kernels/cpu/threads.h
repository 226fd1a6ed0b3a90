// Threads that run one function together and wait for each other between its phases.
//
// Those that wait spin for some microseconds and then sleep, so that a busy machine loses little to them.
#pragma once

#include <atomic>
#include <functional>

namespace kodalle {

class Team;

// Runs work(thread, team) on `num_threads` threads, the caller's among them, and returns when all have ended.
//
// One call has the pool at a time; another one meanwhile runs on its own thread alone. Results must not depend on the
// number of threads.
void run_together(int num_threads, const std::function<void(int, Team&)>& work);

// The threads of one call.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }
  // Waits until all have come here; what they wrote before is then seen by all.
  void wait();

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0};
};

// The part of `count` pieces that is thread `number`'s: [first, last).
struct Share {
  int first, last;
  Share(int count, int number, const Team& team)
      : first(static_cast<int>(static_cast<long long>(count) * number / team.size())),
        last(static_cast<int>(static_cast<long long>(count) * (number + 1) / team.size())) {}
};

}  // namespace kodalle
