// Threads of our own, and the memory that they work in.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace ds {

// TensorFlow's own pool takes as long to wake as a small product to compute. These threads
// watch for work for some microseconds before they sleep.
class Threads {
 public:
  static Threads& shared() {
    static Threads* threads = new Threads;  // lives as long as the process
    return *threads;
  }

  void resize(int count) {
    std::lock_guard<std::mutex> busy(running_);
    for (; started_ < count - 1; started_++) std::thread([this] { work(); }).detach();
    allowed_ = count;
  }

  int count() const { return allowed_; }

  // Calls `task(0)` to `task(count - 1)`, in any order, on all threads.
  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> busy(running_, std::try_to_lock);
    if (count < 2 || allowed_ < 2 || !busy.owns_lock()) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    task_ = &task;
    count_ = count;
    next_ = 0;
    open_ = true;
    round_++;
    if (sleeping_) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take();
    open_ = false;
    // A worker still at it may have lost its processor to another process: don't hold ours.
    for (int spin = 0; active_; spin++) spin < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void take() {
    for (int64_t i = next_++; i < count_; i = next_++) (*task_)(i);
  }

  void work() {
    uint64_t seen = 0;
    while (true) {
      for (int spin = 0; spin < kSpins && round_ == seen; spin++) pause();
      if (round_ == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_++;
        wake_.wait(lock, [&] { return round_ != seen; });
        sleeping_--;
      }
      seen = round_;
      active_++;
      if (open_) take();  // checked after `active_` is up, so `run` can't return meanwhile
      active_--;
    }
  }

  static constexpr int kSpins = 2000;  // some 100 microseconds
  std::mutex running_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0}, sleeping_{0};
  std::atomic<bool> open_{false};
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  int started_ = 0, allowed_ = 1;
};

// 64 bytes at least, aligned for vectors.
struct Free { void operator()(float* p) const { std::free(p); } };
using Memory = std::unique_ptr<float, Free>;
Memory allocate(int64_t count) {
  const int64_t bytes = std::max<int64_t>(64, (count * 4 + 63) / 64 * 64);
  return Memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

// A thread's own buffers; they grow to the largest size asked for, and are never null: an expert
// without tokens asks for none. 0: the left side of a product, 1: its panels, 2: what one head of
// attention takes.
float* scratch(int which, int64_t count) {
  thread_local Memory buffers[3];
  thread_local int64_t sizes[3] = {};
  if (!buffers[which] || sizes[which] < count) {
    buffers[which] = allocate(count);
    sizes[which] = count;
  }
  return buffers[which].get();
}

// What an operation keeps between its products: as large as its tokens are many. Buffers belong to
// no thread, so there are as many as operations run at once; were they a thread's own, each of
// TensorFlow's inter-operation threads would come to have them.
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    std::lock_guard<std::mutex> lock(mutex());
    auto& free = unused();  // by size
    auto found = free.lower_bound(count);
    if (found == free.end()) {
      if (!free.empty()) free.erase(std::prev(found));  // it grows
      found = free.emplace(count, allocate(count));
    }
    size_ = found->first;
    memory_ = std::move(found->second);
    free.erase(found);
  }
  ~Buffer() {
    std::lock_guard<std::mutex> lock(mutex());
    unused().emplace(size_, std::move(memory_));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* floats() const { return memory_.get(); }
  char* bytes() const { return reinterpret_cast<char*>(memory_.get()); }

 private:
  static std::mutex& mutex() {
    static std::mutex* one = new std::mutex;  // live as long as the process, as threads do
    return *one;
  }
  static std::multimap<int64_t, Memory>& unused() {
    static auto* all = new std::multimap<int64_t, Memory>;
    return *all;
  }

  int64_t size_;
  Memory memory_;
};

// Runs `visit(first, end)` on shares of `count` rows.
void shared_rows(int64_t count, const std::function<void(int64_t, int64_t)>& visit) {
  const int64_t share = std::max<int64_t>(64, count / (8 * Threads::shared().count()));
  Threads::shared().run((count + share - 1) / share, [&](int64_t i) {
    visit(i * share, std::min(count, (i + 1) * share));
  });
}

}  // namespace ds
