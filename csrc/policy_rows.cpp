// Hot loops of kernels/fst_kernels/cpu_backend.py over rows of fp32 logits: softmax measures, and the gradient in place.
// No dependency on Python or torch: raw pointers, loaded by ctypes. Every row is worked on by one thread in one order,
// so the bits do not depend on the number of threads.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

// What is known of a row, a tile of the vocabulary after the other: with d = z − peak and w = e^d,
enum State {
  PEAK,       // max z
  TOTAL,      // Σ w
  WEIGHTED,   // Σ w d
  TARGET,     // z of the target
  REF_PEAK,   // the same of the reference's logits, r
  REF_TOTAL,  // Σ e^(r − peak of r)
  CROSS,      // Σ w (d − d of r), or in reverse Σ e^(d of r) (d of r − d)
  STATES
};

// What the gradient of a row needs; the first half is measured, the second is d loss / d measure.
enum Slope {
  AT_PEAK,
  LOG_TOTAL,
  ENTROPY,
  AT_REF_PEAK,
  REF_LOG_TOTAL,
  KL,
  ON_TARGET,   // of the log-prob
  ON_SOFTMAX,  // of the logsumexp, less that of the log-prob
  ON_ENTROPY,
  ON_KL,
  SLOPES
};

// Mirrored by cpu_backend._Rows.
struct Rows {
  int64_t n, v, first;                // rows, columns, and the vocabulary item of the first column
  const float* logits;                // [n, v] as the product left them
  int64_t stride;
  float* grad;                        // [n, v] of the gradient; may be `logits`
  int64_t grad_stride;
  const float* bias;                  // [v] or null
  const float* ref;                   // [n, v] or null
  int64_t ref_stride;
  const float* ref_bias;              // [v] or null
  const int64_t* targets;             // [n] or null
  const float* inverse_temperatures;  // [n]
  double* states;                     // [n, STATES]
  const float* slopes;                // [n, SLOPES]
  float softcap;                      // 0: none
  int32_t reverse;                    // KL(ref‖policy) instead of KL(policy‖ref)
};

namespace {

constexpr int64_t BLOCK = 1024;  // logits worked on at a time: they stay in the first-level cache

#if defined(__x86_64__)
#define PER_LEVEL 1
#else
#define PER_LEVEL 0
#endif

namespace baseline {  // what the compiler assumes anyway: SSE2 on x86-64, NEON on 64-bit ARM
#define BYTES 16
#include "policy_rows_kernel.h"
#undef BYTES
}  // namespace baseline

#if PER_LEVEL
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define BYTES 32
#include "policy_rows_kernel.h"
#undef BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
namespace avx512 {
#define BYTES 64
#include "policy_rows_kernel.h"
#undef BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

using Work = void (*)(const Rows&, int64_t);

void for_each_row(Work work, const Rows& rows, int threads) {
  const int64_t enough = (1 << 16) / (rows.v > 0 ? rows.v : 1) + 1;  // rows worth starting a thread for
  int64_t workers = rows.n / enough;
  workers = workers > threads ? threads : workers < 1 ? 1 : workers;
  // Rows are taken as threads get to them, not dealt out: on a busy machine nobody waits for the slowest thread's share.
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows.n;) work(rows, row);
  };
#ifdef _OPENMP
  // The pool torch's products run on: its threads go on spinning after a product and would be in the way of others.
#pragma omp parallel num_threads((int)workers) if (workers > 1)
  take();
#else
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < workers; ++i) others.emplace_back(take);
  } catch (const std::system_error&) {  // no more threads to be had: those there are do it all
  }
  take();
  for (auto& other : others) other.join();
#endif
}

}  // namespace

extern "C" {

// Tells an extension built from other code than the Python that calls it.
int fst_rows_bytes() { return sizeof(Rows); }

// The best instruction set here: 0 baseline, 1 AVX2, 2 AVX-512.
int fst_rows_level() {
#if PER_LEVEL
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Brings `states` up to date with these columns. A fresh state is (−inf, 0, 0, NaN, −inf, 0, 0).
void fst_rows_measure(const Rows* rows, int level, int threads) {
  Work work = baseline::measure_row;
#if PER_LEVEL
  if (level == 1) work = avx2::measure_row;
  if (level == 2) work = avx512::measure_row;
#endif
  for_each_row(work, *rows, threads);
}

// Fills `grad` with d loss / d logits (before bias, softcap and temperature).
void fst_rows_gradient(const Rows* rows, int level, int threads) {
  Work work = baseline::gradient_row;
#if PER_LEVEL
  if (level == 1) work = avx2::gradient_row;
  if (level == 2) work = avx512::gradient_row;
#endif
  for_each_row(work, *rows, threads);
}

}  // extern "C"
