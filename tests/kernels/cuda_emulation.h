// csrc/hopper.h and the CUDA words of csrc/row_cluster.cu for g++: the kernel runs on a CPU, every thread a fiber.
// It is an adversary, as far as a seed goes: threads run in random order, blocks start late and fall behind each other,
// and a bulk copy happens as late as it can, when no thread can go on. Shared memory begins as NaN. What the hardware
// forbids ends the launch with an error: misaligned copies and stores, a write to memory that a copy has still to read,
// shared memory overrun, or of a block that is not there, a barrier nobody comes to.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define DEVICE static inline
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() emulation::sync_block()
#define __shfl_xor_sync(mask, value, lanes) emulation::shuffle(value, lanes)
#define threadIdx (emulation::now->index)
#define blockIdx (emulation::now->block->index)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace emulation {

enum Error { FINE, MISALIGNED, OVERWRITTEN, OVERRUN, DEADLOCK, NOT_INITIALISED, ABSENT };

inline const char* error_string(int error) {
  static const char* const names[] = {"no error",
                                      "a store or a bulk copy is not aligned",
                                      "a write to memory that a bulk copy has still to read",
                                      "shared memory was written beyond what the launch asked for",
                                      "every thread waits",
                                      "a barrier is used that was not initialised",
                                      "shared memory of a block that has not started or has ended"};
  return names[error];
}

struct Index {
  unsigned x;
};

struct Barrier {  // of threads: a block's, a warp's, or (in two halves) the cluster's
  int expected, arrived = 0, phase = 0;
  int arrive() {
    const int mine = phase;
    if (++arrived == expected) arrived = 0, ++phase;
    return mine;
  }
};

struct Warp {
  Barrier barrier{32};
  float values[2][32];
};

struct Block {
  Index index;
  int rank;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* memory;
  Barrier barrier;
  std::vector<Warp> warps;
  int started = 0, ended = 0;  // of its threads
  bool late = false, resting = false;
};

struct Fiber {
  ucontext_t start;  // from there on by jumps, which unlike swapcontext cost no system call
  jmp_buf here;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Index index;
  Block* block;
  int cluster_phase = 0;
  bool started = false, done = false;
  const std::function<bool()>* waits_for = nullptr;
  static constexpr size_t STACK = 64 << 10;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes;
  uint64_t* barrier;
};

constexpr int CANARY = 4096;  // bytes after the shared memory that nobody may touch

inline Fiber* now;
inline jmp_buf scheduler;
inline std::vector<Block> blocks;
inline std::vector<Fiber> fibers;
inline std::vector<Copy> copies;
inline Barrier cluster{0};
inline int64_t shared_size;
inline int error;
inline std::mt19937 random;
inline std::function<void()> body;

inline void suspend() {
  if (!_setjmp(now->here)) _longjmp(scheduler, 1);
}

inline void resume(Fiber* fiber) {
  now = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->started) _longjmp(fiber->here, 1);
  fiber->started = true;
  ++fiber->block->started;
  setcontext(&fiber->start);
}

inline void wait(const std::function<bool()>& condition) {
  if (condition()) return;
  now->waits_for = &condition;
  suspend();
}

inline void sync_block() {
  Barrier& barrier = now->block->barrier;
  const int phase = barrier.arrive();
  wait([&] { return barrier.phase != phase; });
}

inline float shuffle(float value, int lanes) {
  Warp& warp = now->block->warps[now->index.x / 32];
  const int lane = now->index.x % 32, phase = warp.barrier.phase;
  warp.values[phase % 2][lane] = value;
  warp.barrier.arrive();
  wait([&] { return warp.barrier.phase != phase; });
  return warp.values[phase % 2][lane ^ lanes];
}

struct Bytes {  // what an mbarrier still waits for
  int32_t arrivals, bytes;
};

inline void copy_one() {
  const size_t which = random() % copies.size();
  const Copy copy = copies[which];
  copies.erase(copies.begin() + which);
  std::memcpy(copy.to, copy.from, copy.bytes);
  reinterpret_cast<Bytes*>(copy.barrier)->bytes -= copy.bytes;
}

inline void fiber_main() {
  body();
  now->done = true;
  ++now->block->ended;
  suspend();
}

inline void run_cluster() {
  std::vector<Fiber*> left;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Fiber::STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    left.push_back(&fiber);
  }
  for (Block& block : blocks) block.late = random() % 2;
  bool moved = true;
  while (!left.empty()) {
    const bool some_rest = moved;
    for (Block& block : blocks) block.resting = block.late || (some_rest && random() % 2);
    moved = false;
    std::shuffle(left.begin(), left.end(), random);
    for (Fiber* fiber : left) {
      if (fiber->block->resting || (fiber->waits_for && !(*fiber->waits_for)())) continue;
      fiber->waits_for = nullptr;
      resume(fiber);
      moved = true;
    }
    left.erase(std::remove_if(left.begin(), left.end(), [](Fiber* fiber) { return fiber->done; }), left.end());
    if (moved || some_rest) continue;
    if (!copies.empty()) {
      copy_one();
      continue;
    }
    const auto late = std::find_if(blocks.begin(), blocks.end(), [](const Block& block) { return block.late; });
    if (late == blocks.end()) {
      error = error ? error : DEADLOCK;
      return;
    }
    late->late = false;
  }
}

template <typename Arguments>
int launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t n, int cluster_size, int threads,
           int64_t bytes) {
  error = FINE;
  shared_size = bytes;
  random.seed(static_cast<unsigned>(bytes * 1024 + n * 32 + cluster_size));
  body = [&] { kernel(arguments); };
  for (int64_t row = 0; row < n && !error; ++row) {
    copies.clear();
    fibers.clear();
    blocks.clear();
    cluster = Barrier{cluster_size * threads};
    for (int rank = 0; rank < cluster_size; ++rank) {
      Block block{{unsigned(row * cluster_size + rank)}, rank};
      block.storage.reset(new unsigned char[bytes + CANARY + 128]);
      block.memory = block.storage.get() + (128 - reinterpret_cast<uintptr_t>(block.storage.get()) % 128);
      std::memset(block.memory, 0xff, bytes + CANARY);
      block.barrier.expected = threads;
      block.warps.resize(threads / 32);
      blocks.push_back(std::move(block));
    }
    fibers.resize(cluster_size * threads);
    for (size_t i = 0; i < fibers.size(); ++i) {
      fibers[i].index.x = i % threads;
      fibers[i].block = &blocks[i / threads];
    }
    run_cluster();
    for (const Block& block : blocks) {
      const auto touched = [](unsigned char byte) { return byte != 0xff; };
      if (std::any_of(block.memory + bytes, block.memory + bytes + CANARY, touched)) error = error ? error : OVERRUN;
    }
  }
  return error;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulation

// ---- the same names as in hopper.h ----------------------------------------------------------------------------------

DEVICE float __uint_as_float(uint32_t bits) { return emulation::float_of(bits); }
DEVICE unsigned char* shared_memory() { return emulation::now->block->memory; }
DEVICE int cluster_size() { return static_cast<int>(emulation::blocks.size()); }
DEVICE int cluster_rank() { return emulation::now->block->rank; }

DEVICE void cluster_arrive() {
  emulation::now->cluster_phase = emulation::cluster.arrive();
  if (emulation::random() % 2) emulation::suspend();  // others may go on before it does
}
DEVICE void cluster_started() { cluster_arrive(); }
DEVICE void cluster_wait() {
  const int phase = emulation::now->cluster_phase;
  emulation::wait([&] { return emulation::cluster.phase != phase; });
}

template <typename T>
DEVICE T* in_block(T* p, int rank) {
  const emulation::Block& block = emulation::blocks[rank];
  if (block.started == 0 || block.ended == block.barrier.expected) emulation::error = emulation::ABSENT;
  const auto offset = reinterpret_cast<unsigned char*>(p) - shared_memory();
  return reinterpret_cast<T*>(block.memory + offset);
}

DEVICE void barrier_init(uint64_t* barrier) { *reinterpret_cast<emulation::Bytes*>(barrier) = {1, 0}; }
DEVICE void barrier_publish() {}

DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  auto& state = *reinterpret_cast<emulation::Bytes*>(barrier);
  if (state.arrivals != 1) emulation::error = emulation::NOT_INITIALISED;
  state.arrivals = 0;
  state.bytes += bytes;
}

DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    emulation::error = emulation::MISALIGNED;
  emulation::copies.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, barrier});
}

DEVICE void barrier_wait(uint64_t* barrier) {
  const auto& state = *reinterpret_cast<emulation::Bytes*>(barrier);
  if (state.arrivals < 0) emulation::error = emulation::NOT_INITIALISED;
  emulation::wait([&] { return state.arrivals == 0 && state.bytes == 0; });
}

DEVICE float exp2_approximate(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0 : y;
}

DEVICE float reciprocal_approximate(float x) { return 1 / x; }
DEVICE uint32_t bf16_pair(float first, float second) {
  return emulation::bf16_of(first) | emulation::bf16_of(second) << 16;
}

template <typename T>
DEVICE void store(void* to, T value) {
  const auto* const from = static_cast<const unsigned char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) emulation::error = emulation::MISALIGNED;
  for (const auto& copy : emulation::copies) {
    if (from < copy.from + copy.bytes && copy.from < from + sizeof(T)) emulation::error = emulation::OVERWRITTEN;
  }
  std::memcpy(to, &value, sizeof(T));
}
