// The row kernel of cuda_backend.py for Hopper (sm_90a): one read and one write of device memory a row.
//
// A cluster of thread blocks holds a row of logits in its shared memory, each block a slice. Bulk copies bring the
// slices in, tile after tile, while the threads measure the tiles that are there: maximum, sum and expectations, joined
// over the cluster. Then each block writes the gradient of its slice. No block writes before all have read (the
// cluster's barrier), so the gradient may lie in the row's own memory, in bf16 too. What is measured and what the
// gradient is: row_kernel in triton_kernels.py, which this follows line by line, and which reads each row twice.
//
// Compiled with -fmad=false: every pass sees the same logits to the last bit, and no log-prob is above 0.
// No dependency on Python or torch; no atomics, all sums in one fixed order: two runs give the same bits.
#include <cmath>
#include <cstdint>
#ifdef __CUDACC__
#include "hopper.h"
#else
#include "cuda_emulation.h"
#endif

enum Kind { GIVEN, CISPO, PPO, REINFORCE };

// Of a row's gradient: nothing but zeros, a multiple of the softmax (and of the target), or more.
enum Form { IDLE, PLAIN, GENERAL };

// Per row, in the order of blocks.Measures.
enum Measure { LOGPROB, ENTROPY, KL, LOGSUMEXP, MEASURES };

// Mirrored by cuda_backend._Rows. Strides in items; rows of logits, ref and grad begin at multiples of 16 bytes.
struct Rows {
  int64_t n;
  const void* logits;  // [n, v] fp32 or bf16
  int64_t stride;
  const void* ref;  // the same of the KL's reference, or null
  int64_t ref_stride;
  const float* bias;  // [v] or null
  const float* ref_bias;
  void* grad;  // [n, v] fp32 or bf16, may be the memory of logits; null: measure only
  int64_t grad_stride;
  const int64_t* targets;         // [n] or null
  const float* temperature;       // [n] or null
  float* found[MEASURES];         // [n] each, null where nobody asks
  const float* slopes[MEASURES];  // [n] those of the loss in the measures, null for 0
  const float* behavior;          // [n] what the slope in the log-prob is made of, unless kind is GIVEN
  const float* advantages;
  const float* weights;
  float low, high;  // the ratio's bounds
  float softcap;    // 0: none
  int32_t v, kind, reverse_kl, bf16_logits, bf16_grad;
};

namespace {

constexpr float INF = INFINITY;
constexpr float LOWEST = -3.4028234663852886e38f;  // where maxima start: unlike −inf, finite minus it is never NaN
constexpr float FAR = -1e30f;                      // as good as −inf under exp, and 0 times it is 0
constexpr int ITEMS = 8;                           // logits of a thread in a tile
constexpr int WARP = 32;

// A cluster's share of a row in each block, in items. A multiple of 16: slices begin at 16 bytes in bf16 too.
__host__ __device__ constexpr int slice_items(int v, int cluster) {
  return ((v + cluster - 1) / cluster + 15) / 16 * 16;
}

// What is known of a part of a row; with d = x − peak and w = e^d of the logits x, and y those of the reference,
struct alignas(16) State {
  float peak;       // max x
  float total;      // Σ w
  float moment;     // Σ w d
  float gap;        // Σ w (x − y), or in reverse Σ e^(y − ref_peak) (y − x)
  float ref_peak;   // max y
  float ref_total;  // Σ e^(y − ref_peak)
  float forbidden;  // above 0: an item is possible here and impossible there, so the KL is infinite
  float chosen;     // x of the target, from the block that holds it
};

// What the gradient of a row needs.
struct Row {
  float peak, log_total, inverse_total, ref_peak, ref_log_total;
  float on_target, on_probs, on_entropy, on_kl;
  Form form;
};

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// e^d for d ≤ 0, to 1.2e-7 · (1 + |d|): the terms of a sum that matter have d > −20.
DEVICE float exponential(float d) { return exp2_approximate(d * 1.44269504f); }

// z / c rounded to nearest where the result is normal, with `inverse` near 1 / c; ±inf and NaN as in z / c.
DEVICE float divide(float z, float c, float inverse) {
  const float q = z * inverse;
  const float better = fmaf(fmaf(-q, c, z), inverse, q);
  return fabsf(better) <= -LOWEST ? better : q;
}

DEVICE float hyperbolic_tangent(float u) {
  const float e = exponential(-2 * fabsf(u));
  const float far = copysignf((1 - e) * reciprocal_approximate(1 + e), u);
  const float s = u * u;  // near 0 that cancels: Cephes' tanhf polynomial
  float near = fmaf(-5.70498872745e-3f, s, 2.06390887954e-2f);
  near = fmaf(near, s, -5.37397155531e-2f);
  near = fmaf(near, s, 1.33314422036e-1f);
  near = fmaf(near, s, -3.33332819422e-1f);
  return fabsf(u) < 0.625f ? fmaf(near * s, u, u) : far;
}

// 0 where the weight is 0 whatever the value: items of probability 0 count nothing.
DEVICE float product(float weight, float value) { return weight == 0 ? 0 : weight * value; }

DEVICE float sum(const float (&x)[ITEMS]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// ---- the logits a thread works on: two runs of four -----------------------------------------------------------------

struct Shape {
  float softcap, inverse_softcap;  // 0: none
  float temperature, inverse_temperature;
  bool tempered;
};

DEVICE float widen(float z) { return z; }
DEVICE float widen(uint16_t z) { return __uint_as_float(uint32_t(z) << 16); }  // bf16 is the upper half of fp32

DEVICE void widen(const float* from, float* z) {
  const float4 q = *reinterpret_cast<const float4*>(from);
  z[0] = q.x, z[1] = q.y, z[2] = q.z, z[3] = q.w;
}

DEVICE void widen(const uint16_t* from, float* z) {
  const uint2 q = *reinterpret_cast<const uint2*>(from);
  z[0] = __uint_as_float(q.x << 16), z[1] = __uint_as_float(q.x & 0xffff0000u);
  z[2] = __uint_as_float(q.y << 16), z[3] = __uint_as_float(q.y & 0xffff0000u);
}

// The head's logits at `at` and from `at + gap` on; anything from `count` on. bias is that of the slice.
template <typename In>
DEVICE void read(float (&z)[ITEMS], const In* held, int at, int gap, int count, const float* bias) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from = at + half * gap;
    float* part = z + half * 4;
    if (from < count) {
      widen(held + from, part);
    } else {
      part[0] = part[1] = part[2] = part[3] = 0;
    }
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (from + i < count) part[i] += bias[from + i];
      }
    }
  }
}

template <int N>
DEVICE void shape(float (&z)[N], const Shape& by) {
  if (by.softcap > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      z[i] = by.softcap * hyperbolic_tangent(divide(z[i], by.softcap, by.inverse_softcap));
  }
  if (by.tempered) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = divide(z[i], by.temperature, by.inverse_temperature);
  }
}

// Logits after softcap and temperature; −inf from `count` on.
DEVICE void shape(float (&z)[ITEMS], const Shape& by, int at, int gap, int count) {
  shape(z, by);
  if (at + gap + 4 > count) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (at + i / 4 * gap + i % 4 >= count) z[i] = -INF;
    }
  }
}

// ---- measuring ------------------------------------------------------------------------------------------------------

DEVICE State nothing() { return {LOWEST, 0, 0, 0, LOWEST, 0, 0, 0}; }

// Moves the peaks of a state up to these.
template <bool REF>
DEVICE void raise(State& s, float peak, float ref_peak, bool reverse) {
  const float moved = fmaxf(s.peak - peak, FAR), scale = exponential(moved);
  s.moment = scale * (s.moment + moved * s.total);
  s.total *= scale;
  s.peak = peak;
  if (REF) {
    const float ref_scale = exponential(fmaxf(s.ref_peak - ref_peak, FAR));
    s.gap *= reverse ? ref_scale : scale;
    s.ref_total *= ref_scale;
    s.ref_peak = ref_peak;
  }
}

// Takes in some logits, and those of the reference.
template <bool REF>
DEVICE void take(State& s, const float (&x)[ITEMS], const float (&y)[ITEMS], bool reverse) {
  float peak = s.peak, ref_peak = s.ref_peak;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    peak = fmaxf(peak, x[i]);
    if (REF) ref_peak = fmaxf(ref_peak, y[i]);
  }
  raise<REF>(s, peak, ref_peak, reverse);
  float weight[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const float d = x[i] - peak;
    weight[i] = exponential(d);
    s.moment = fmaf(weight[i], fmaxf(d, FAR), s.moment);
  }
  s.total += sum(weight);
  if (REF) {
    float ref_weight[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      ref_weight[i] = exponential(y[i] - ref_peak);
      const float from = reverse ? y[i] : x[i], to = reverse ? x[i] : y[i];  // KL(from‖to)
      const bool both = from != -INF && to != -INF;
      if (both) s.gap += (reverse ? ref_weight[i] : weight[i]) * fminf(fmaxf(from - to, FAR), -FAR);
      if (to == -INF && from > -INF) s.forbidden = 1;
    }
    s.ref_total += sum(ref_weight);
  }
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// The states of a warp's threads joined, the same in every thread.
template <bool REF>
DEVICE State join(State s, bool reverse) {
  const float peak = warp_max(s.peak);
  raise<REF>(s, peak, REF ? warp_max(s.ref_peak) : 0, reverse);
  s.total = warp_sum(s.total);
  s.moment = warp_sum(s.moment);
  if (REF) {
    s.gap = warp_sum(s.gap);
    s.ref_total = warp_sum(s.ref_total);
    s.forbidden = warp_sum(s.forbidden);
  }
  return s;
}

// ---- from the measures to the slopes --------------------------------------------------------------------------------

DEVICE float given(const float* values, int64_t row) { return values == nullptr ? 0 : values[row]; }

// The slopes of a row's loss, loaded while the cluster waits.
struct Slopes {
  float logprob, entropy, kl, logsumexp;  // given ones
  float behavior, advantage, weight;
};

DEVICE Slopes load_slopes(const Rows& rows, int64_t row) {
  return {given(rows.slopes[LOGPROB], row), given(rows.slopes[ENTROPY], row), given(rows.slopes[KL], row),
          given(rows.slopes[LOGSUMEXP], row), given(rows.behavior, row), given(rows.advantages, row),
          given(rows.weights, row)};
}

// d loss / d log-prob of one token: `Objective.terms`. Comparisons are written so that a NaN stays.
DEVICE float objective_slope(const Rows& rows, const Slopes& of, float logprob) {
  const float log_ratio = logprob - of.behavior;
  const float ratio = expf(log_ratio > 20 ? 20 : log_ratio);
  float bounded = ratio < rows.low ? rows.low : ratio;
  bounded = bounded > rows.high ? rows.high : bounded;
  if (rows.kind == PPO) {
    const bool flat = ratio * of.advantage > bounded * of.advantage || log_ratio > 20;
    return flat ? 0 : -ratio * of.advantage;
  }
  return (rows.kind == CISPO ? -bounded : -1) * of.advantage;
}

// The measures of a row, written by one block, and what its gradient needs.
DEVICE Row finish(const Rows& rows, int64_t row, const State& s, const Slopes& of, bool inside, bool first_block) {
  const float log_total = logf(s.total);
  const float entropy = log_total - s.moment / s.total;
  float kl = 0, ref_log_total = 0;
  if (rows.ref != nullptr) {
    ref_log_total = logf(s.ref_total);
    kl = rows.reverse_kl ? s.gap / s.ref_total + (s.peak - s.ref_peak) + (log_total - ref_log_total)
                         : s.gap / s.total + (s.ref_peak - s.peak) + (ref_log_total - log_total);
    if (s.forbidden > 0) kl = INF;
  }
  const float logprob = inside ? s.chosen - s.peak - log_total : NAN;
  if (first_block) {
    const float values[MEASURES] = {logprob, entropy, kl, s.peak + log_total};
#pragma unroll
    for (int i = 0; i < MEASURES; ++i) {
      if (rows.found[i] != nullptr) rows.found[i][row] = values[i];
    }
  }
  const float on_target = rows.kind == GIVEN ? of.logprob : of.weight * objective_slope(rows, of, logprob);
  const bool idle = on_target == 0 && of.logsumexp == 0 && of.entropy == 0 && of.kl == 0;
  float on_probs = of.logsumexp - on_target;
  if (rows.slopes[ENTROPY] != nullptr) on_probs -= of.entropy * entropy;
  if (rows.slopes[KL] != nullptr) on_probs = rows.reverse_kl ? on_probs + of.kl : on_probs - of.kl * kl;
  const bool plain = of.entropy == 0 && of.kl == 0 && fabsf(on_probs) <= -LOWEST;
  return {s.peak,    log_total, 1 / s.total, s.ref_peak, ref_log_total,
          on_target, on_probs,  of.entropy,  of.kl,      idle ? IDLE : plain ? PLAIN : GENERAL};
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

// d loss / d logits, given the head's logits z, those after softcap and temperature x, and those of the reference y;
// before softcap and temperature were applied. In place on x.
template <bool REF>
DEVICE void differentiate(float (&x)[ITEMS], const float (&z)[ITEMS], const float (&y)[ITEMS], const Row& row,
                          const Shape& by, bool reverse, int at, int gap, int target) {
  if (row.form == IDLE) {  // whatever the logits are
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] = 0;
    return;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) x[i] -= row.peak;
  if (row.form == PLAIN) {
    const float factor = row.inverse_total * row.on_probs;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] = exponential(x[i]) * factor;
  } else {
    float value[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) value[i] = row.on_probs - product(row.on_entropy, x[i] - row.log_total);
    if (REF && row.on_kl != 0 && !reverse) {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i)
        value[i] += row.on_kl * ((x[i] - row.log_total) - ((y[i] - row.ref_peak) - row.ref_log_total));
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] = product(exponential(x[i]) * row.inverse_total, value[i]);
    if (REF && row.on_kl != 0 && reverse) {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) x[i] -= row.on_kl * exponential(y[i] - row.ref_peak - row.ref_log_total);
    }
  }
  if ((target >= at && target < at + 4) || (target >= at + gap && target < at + gap + 4)) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (at + i / 4 * gap + i % 4 == target) x[i] += row.on_target;
    }
  }
  if (by.tempered) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] *= by.inverse_temperature;
  }
  if (by.softcap > 0) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const float e = exponential(-2 * fabsf(divide(z[i], by.softcap, by.inverse_softcap)));
      const float r = reciprocal_approximate(1 + e);
      x[i] *= 4 * e * r * r;  // 1 − tanh² would lose its digits where the cap saturates
    }
  }
}

DEVICE void write(const float (&g)[ITEMS], uint16_t* grad, int at, int count) {
  const uint4 q = {bf16_pair(g[0], g[1]), bf16_pair(g[2], g[3]), bf16_pair(g[4], g[5]), bf16_pair(g[6], g[7])};
  if (at + ITEMS <= count) {
    store(grad + at, q);
  } else {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (at + i < count) store(grad + at + i, static_cast<uint16_t>(bf16_pair(g[i], 0)));
    }
  }
}

DEVICE void write(const float (&g)[ITEMS], float* grad, int at, int gap, int count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* part = g + half * 4;
    const int to = at + half * gap;
    if (to + 4 <= count) {
      store(grad + to, float4{part[0], part[1], part[2], part[3]});
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (to + i < count) store(grad + to + i, part[i]);
      }
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Bytes of shared memory of a block that holds its slice of this many bytes an item (a reference's included).
constexpr int64_t shared_bytes(int v, int item_bytes, int cluster, int threads) {
  const int64_t slice = slice_items(v, cluster), tile = threads * ITEMS;
  return slice * item_bytes + (cluster + threads / WARP) * sizeof(State) + (slice + tile - 1) / tile * sizeof(uint64_t);
}

// One cluster a row. A reference's row is held as well: in a larger cluster it is read once, streamed it would be twice.
template <typename In, bool REF, int THREADS>
__global__ void __launch_bounds__(THREADS, 3) row_kernel(const __grid_constant__ Rows rows) {
  constexpr int TILE = THREADS * ITEMS, WARPS = THREADS / WARP;
  const int cluster = cluster_size(), rank = cluster_rank(), thread = threadIdx.x, lane = thread % WARP;
  const int64_t row = blockIdx.x / static_cast<unsigned>(cluster);
  const int slice = slice_items(rows.v, cluster), first = rank * slice, left = rows.v - first;
  const int count = left < 0 ? 0 : left < slice ? left : slice;
  const int tiles = (count + TILE - 1) / TILE;
  const bool reverse = rows.reverse_kl;

  In* const held = reinterpret_cast<In*>(shared_memory());
  In* const ref_held = held + slice;
  State* const states = reinterpret_cast<State*>(held + (REF ? 2 : 1) * slice);  // of every block of the cluster
  State* const of_warps = states + cluster;
  uint64_t* const arrivals = reinterpret_cast<uint64_t*>(of_warps + WARPS);

  if (thread == 0) {
    const In* const from = static_cast<const In*>(rows.logits) + row * rows.stride + first;
    const In* const ref_from = static_cast<const In*>(rows.ref) + row * rows.ref_stride + first;
    for (int tile = 0; tile < tiles; ++tile) barrier_init(arrivals + tile);
    barrier_publish();
    for (int tile = 0; tile < tiles; ++tile) {
      const int at = tile * TILE, items = count - at < TILE ? count - at : TILE;
      const uint32_t bytes = (items * sizeof(In) + 15) / 16 * 16;
      barrier_expect(arrivals + tile, REF ? 2 * bytes : bytes);
      bulk_load(held + at, from + at, bytes, arrivals + tile);
      if (REF) bulk_load(ref_held + at, ref_from + at, bytes, arrivals + tile);
    }
  }
  cluster_started();
  __syncthreads();

  Shape by{rows.softcap, 1 / rows.softcap, 1, 1, rows.temperature != nullptr};
  if (by.tempered) by.temperature = rows.temperature[row], by.inverse_temperature = 1 / by.temperature;
  const float* const bias = rows.bias == nullptr ? nullptr : rows.bias + first;
  const float* const ref_bias = rows.ref_bias == nullptr ? nullptr : rows.ref_bias + first;
  const int64_t target = rows.targets == nullptr ? -1 : rows.targets[row];
  const bool inside = rows.targets == nullptr || (target >= 0 && target < rows.v);
  const int place = target >= first && target < first + count ? static_cast<int>(target - first) : -1;

  State state = nothing();
  for (int tile = 0; tile < tiles; ++tile) {
    barrier_wait(arrivals + tile);
    const int at = tile * TILE + thread * 4, gap = THREADS * 4;
    float x[ITEMS], y[ITEMS];
    read(x, held, at, gap, count, bias);
    shape(x, by, at, gap, count);
    if (REF) {
      read(y, ref_held, at, gap, count, ref_bias);
      shape(y, by, at, gap, count);
    }
    take<REF>(state, x, y, reverse);
  }

  state = join<REF>(state, reverse);
  if (lane == 0) of_warps[thread / WARP] = state;
  __syncthreads();
  cluster_wait();  // every block has started: its memory may be written
  if (thread < WARP) {
    state = nothing();
    if (lane < WARPS) state = of_warps[lane];
    state = join<REF>(state, reverse);
    if (place >= 0) {
      float x[1] = {widen(held[place])};
      if (bias != nullptr) x[0] += bias[place];
      shape(x, by);
      state.chosen = x[0];
    }
    if (lane < cluster) *in_block(states + rank, lane) = state;
  }
  cluster_arrive();
  Slopes slopes = {};
  if (thread == 0) slopes = load_slopes(rows, row);
  cluster_wait();  // every block has read its slice, and its state is here

  Row* const shared_row = reinterpret_cast<Row*>(of_warps);
  if (thread < WARP) {
    state = nothing();
    if (lane < cluster) state = states[lane];
    state = join<REF>(state, reverse);
    if (target >= 0 && inside) state.chosen = states[static_cast<int>(target) / slice].chosen;
    if (lane == 0) *shared_row = finish(rows, row, state, slopes, inside, rank == 0);
  }
  if (rows.grad == nullptr) return;
  __syncthreads();
  const Row known = *shared_row;

  // Four logits and four further on make 16-byte stores of fp32; eight in a run make them of bf16.
  const int run = rows.bf16_grad ? ITEMS : 4, gap = rows.bf16_grad ? 4 : THREADS * 4;
  uint16_t* const narrow = static_cast<uint16_t*>(rows.grad) + row * rows.grad_stride + first;
  float* const wide = static_cast<float*>(rows.grad) + row * rows.grad_stride + first;
  for (int tile = 0; tile < tiles; ++tile) {
    const int at = tile * TILE + thread * run;
    float x[ITEMS], y[ITEMS], z[ITEMS];
    read(z, held, at, gap, count, bias);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] = z[i];
    shape(x, by, at, gap, count);
    if (REF && known.on_kl != 0) {
      read(y, ref_held, at, gap, count, ref_bias);
      shape(y, by, at, gap, count);
    }
    differentiate<REF>(x, z, y, known, by, reverse, at, gap, place);
    if (rows.bf16_grad) {
      write(x, narrow, at, count);
    } else {
      write(x, wide, at, gap, count);
    }
  }
}

}  // namespace

// ---- what Python calls ----------------------------------------------------------------------------------------------

#ifdef __CUDACC__
constexpr int THREADS = 256;
#else
constexpr int THREADS = EMULATED_THREADS;
#endif

namespace {

using Kernel = void (*)(Rows);

Kernel kernel_of(const Rows& rows) {
  const bool ref = rows.ref != nullptr;
  if (rows.bf16_logits) return ref ? row_kernel<uint16_t, true, THREADS> : row_kernel<uint16_t, false, THREADS>;
  return ref ? row_kernel<float, true, THREADS> : row_kernel<float, false, THREADS>;
}

}  // namespace

extern "C" {

// Tells an extension built from other code than the Python that calls it.
int fst_cluster_bytes() { return sizeof(Rows); }

// Blocks of a cluster for rows of v items of so many bytes, a reference's included; 0: no cluster holds such a row.
//
// While one block of a multiprocessor computes and writes, the loads of others keep the memory busy: so the smallest
// cluster that lets three blocks share a multiprocessor, else two, else one. Three blocks hold up to 75 KB each, all of it
// under way when a row begins; 4.8 TB/s and 1 µs ask for 36 KB in flight a multiprocessor. Small, as blocks that wait for
// each other lie idle. Not measured.
int fst_cluster_size(int v, int item_bytes) {
  constexpr int64_t MULTIPROCESSOR = 228 << 10, BLOCK = 227 << 10;  // bytes of shared memory, of compute capability 9.0
  constexpr int64_t RESERVED = 1024, GRAIN = 128;                   // the system's of every block, and of an allocation
  for (int blocks = 3; blocks > 0; --blocks) {
    for (int cluster = 1; cluster <= 16; cluster *= 2) {
      const int64_t bytes = (shared_bytes(v, item_bytes, cluster, THREADS) + GRAIN - 1) / GRAIN * GRAIN;
      if (bytes <= BLOCK && blocks * (bytes + RESERVED) <= MULTIPROCESSOR) return cluster;
    }
  }
  return 0;
}

// Puts the rows' work on the stream, a cluster a row; returns a cudaError_t.
int fst_cluster_rows(const Rows* rows, int cluster, void* stream) {
  const Kernel kernel = kernel_of(*rows);
  const int item_bytes = (rows->bf16_logits ? 2 : 4) * (rows->ref == nullptr ? 1 : 2);
  const int64_t bytes = shared_bytes(rows->v, item_bytes, cluster, THREADS);
#ifdef __CUDACC__
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess && cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute clusters;
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(unsigned(rows->n * cluster));
  launch.blockDim = dim3(THREADS);
  launch.dynamicSmemBytes = size_t(bytes);
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &clusters;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, *rows);
#else
  return emulation::launch(kernel, *rows, rows->n, cluster, THREADS, bytes);
#endif
}

const char* fst_cluster_error(int error) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return emulation::error_string(error);
#endif
}

}  // extern "C"
