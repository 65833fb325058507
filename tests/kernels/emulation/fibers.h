#pragma once

// Threads of a CUDA block as fibers: scheduling, barriers, shuffles. See emulation.h.

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kNobody = -1, kSeveral = -2;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  int line;             // of the barrier it waits at
  int shuffles;         // how many it took part in: even and odd ones use different slots
  uint32_t offered[2];  // what the other lanes of its warp may take
};

// Shared memory starts every block unwritten.
struct SharedMemory {
  virtual void forget() = 0;

 protected:
  ~SharedMemory() = default;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<SharedMemory*> memories;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  int threads = 0, current = 0, barriers = 0;
  unsigned order = 0;  // 0: by number; 1: backwards; else: a seed
  std::string failure;
  dim3 thread_index, block_index, block_shape, grid_shape;
};

inline Machine machine;

inline Fiber& running() { return machine.fibers[machine.current]; }

inline void give_way(State state) {
  running().state = state;
  swapcontext(&running().context, &machine.scheduler);
  machine.thread_index = dim3(machine.current, 0, 0);
}

// Ends the launch: the fiber never runs again.
inline void fail(const std::string& what) {
  if (machine.failure.empty()) {
    machine.failure = what + " (thread " + std::to_string(machine.current) + ", block " +
                      std::to_string(machine.block_index.x) + ")";
  }
  give_way(State::done);
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("unaligned access of " + std::to_string(bytes) + " bytes");
  }
}

inline void barrier(int line) {
  running().line = line;
  give_way(State::at_barrier);
}

template <class Type>
Type shuffle(unsigned mask, Type value, int source_lane) {
  static_assert(sizeof(Type) == sizeof(uint32_t), "a shuffle moves 4 bytes");
  if (mask != 0xffffffffu) fail("a shuffle of a part of the warp");
  // Before anybody can offer to a slot again, all lanes have come to the next shuffle and so taken from this
  // one.
  const int slot = running().shuffles++ % 2;
  std::memcpy(&running().offered[slot], &value, sizeof(value));
  const int warp_start = machine.current - machine.current % kWarp;
  give_way(State::at_shuffle);
  std::memcpy(&value, &machine.fibers[warp_start + source_lane].offered[slot], sizeof(value));
  return value;
}

inline int lane() { return machine.current % kWarp; }

inline void run_fiber() {
  (*machine.body)();
  give_way(State::done);
}

inline void start_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  fiber.state = State::ready;
  fiber.shuffles = 0;
  makecontext(&fiber.context, run_fiber, 0);
}

inline int position_in_order(int step) {
  const int threads = machine.threads;
  if (machine.order == 0) return step;
  if (machine.order == 1) return threads - 1 - step;
  // Blocks are whole warps, so an odd multiplier need not reach every number: take the next one that is
  // coprime.
  auto coprime = [threads](int number) {
    for (int a = threads, b = number;;) {
      if (b == 0) return a == 1;
      const int rest = a % b;
      a = b;
      b = rest;
    }
  };
  int stride = static_cast<int>(machine.order * 37 % threads) | 1;
  while (!coprime(stride)) stride += 2;
  return static_cast<int>((static_cast<int64_t>(step) * stride + machine.order) % threads);
}

// Lets the warps whose lanes have all come to a shuffle go on; false if none could.
inline bool release_shuffles() {
  bool released = false;
  for (int start = 0; start < machine.threads; start += kWarp) {
    bool all = true;
    for (int i = start; i < start + kWarp; ++i) all = all && machine.fibers[i].state == State::at_shuffle;
    for (int i = start; all && i < start + kWarp; ++i) machine.fibers[i].state = State::ready;
    released = released || all;
  }
  return released;
}

// Lets the block go on if every thread waits at the same barrier; otherwise says why it can never go on.
inline void release_barrier() {
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::at_shuffle)
      machine.failure = "a shuffle that not every lane of the warp takes part in";
    if (fiber.state == State::done) machine.failure = "a barrier that not every thread reaches";
    if (fiber.state == State::at_barrier && fiber.line != machine.fibers[0].line) {
      machine.failure = "threads wait at different barriers";
    }
    if (!machine.failure.empty()) return;
  }
  for (int i = 0; i < machine.threads; ++i) machine.fibers[i].state = State::ready;
  ++machine.barriers;
}

inline bool all_done() {
  for (int i = 0; i < machine.threads; ++i) {
    if (machine.fibers[i].state != State::done) return false;
  }
  return true;
}

inline void run_block() {
  for (SharedMemory* memory : machine.memories) memory->forget();
  machine.barriers = 0;
  for (int i = 0; i < machine.threads; ++i) start_fiber(machine.fibers[i]);
  while (machine.failure.empty() && !all_done()) {
    for (int step = 0; step < machine.threads && machine.failure.empty(); ++step) {
      machine.current = position_in_order(step);
      if (running().state != State::ready) continue;
      machine.thread_index = dim3(machine.current, 0, 0);
      swapcontext(&machine.scheduler, &running().context);
    }
    if (machine.failure.empty() && !all_done() && !release_shuffles()) release_barrier();
  }
}

inline void launch(dim3 blocks, unsigned threads, const std::function<void()>& body) {
  machine.failure.clear();
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) {
    machine.failure = "a block of " + std::to_string(threads) + " threads";
    return;
  }
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.threads = static_cast<int>(threads);
  machine.body = &body;
  machine.block_shape = dim3(threads);
  machine.grid_shape = blocks;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        machine.block_index = dim3(x, y, z);
        run_block();
        if (!machine.failure.empty()) return;
      }
    }
  }
}

}  // namespace emulation
