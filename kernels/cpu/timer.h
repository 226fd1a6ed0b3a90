// Nanoseconds of a thread by part of a call; where they are not counted, a test of a pointer.
#pragma once

#include <chrono>

#include "step.h"

namespace kodalle {

class Timer {
 public:
  explicit Timer(int64_t* by_part) : by_part_(by_part) {
    if (by_part_ != nullptr) last_ = Clock::now();
  }
  // Counts what has passed since the last call as `part`.
  void lap(Part part) {
    if (by_part_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    by_part_[part] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  int64_t* by_part_;
  Clock::time_point last_;
};

}  // namespace kodalle
