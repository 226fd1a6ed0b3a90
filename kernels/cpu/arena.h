// Memory of a call.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace kodalle {

// Memory of a call, in pieces that start at cache lines; kept by the calling thread for its next call.
class Arena {
 public:
  ~Arena() { std::free(memory_); }
  void begin(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_));
    }
    used_ = 0;
  }
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += padded(count * sizeof(T));
    return piece;
  }
  static size_t padded(int64_t bytes) { return static_cast<size_t>(bytes + 63) / 64 * 64; }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace kodalle
