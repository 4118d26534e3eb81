// One row of logits, for one instruction set: included by policy_rows.cpp once for each, inside a namespace of its own
// and with BYTES, the width of its vectors. Only GCC's and clang's vector extensions: no intrinsics.

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
constexpr int64_t LANES = BYTES / 4;
static_assert(BLOCK % LANES == 0, "a block is whole vectors");

static inline Floats all(float x) { return Floats{} + x; }

static inline Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, BYTES);
  return x;
}

static inline void store(float* p, Floats x) { memcpy(p, &x, BYTES); }

static inline double sum(Floats x) {
  double total = 0;
  for (int64_t i = 0; i < LANES; ++i) total += x[i];
  return total;
}

// e^x for x ≤ 88, relative error below 2e-7 (Cephes' polynomial); 0 where e^x is denormal, NaN stays NaN.
static inline Floats exponential(Floats x) {
  const Floats lowest = all(-87.33654f), magic = all(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer
  const Floats clamped = x < lowest ? lowest : x;
  const Floats shifted = clamped * all(1.44269504f) + magic, n = shifted - magic;
  Floats r = clamped - n * all(0.693359375f);
  r = r + n * all(2.12194440e-4f);
  Floats y = all(1.9875691500e-4f);
  y = y * r + all(1.3981999507e-3f);
  y = y * r + all(8.3334519073e-3f);
  y = y * r + all(4.1665795894e-2f);
  y = y * r + all(1.6666665459e-1f);
  y = y * r + all(5.0000001201e-1f);
  y = y * (r * r) + r + all(1.0f);
  const Bits power = ((Bits)shifted << 23) + (Bits{} + 0x3f800000u);  // 2ⁿ
  return x < lowest ? Floats{} : y * (Floats)power;
}

// tanh, and its derivative with all digits where it saturates.
static inline Floats tangent(Floats x, Floats& slope) {
  const Floats size = (Floats)((Bits)x & (Bits{} + 0x7fffffffu));
  const Floats e = exponential(size * all(-2.0f)), one = all(1.0f);
  slope = all(4.0f) * e / ((one + e) * (one + e));
  const Floats far = (Floats)((Bits)((one - e) / (one + e)) | ((Bits)x & (Bits{} + 0x80000000u)));
  const Floats square = x * x;
  Floats near = all(-5.70498872745e-3f);  // Cephes: here 1 − e would lose digits
  near = near * square + all(2.06390887954e-2f);
  near = near * square + all(-5.37397155531e-2f);
  near = near * square + all(1.33314422036e-1f);
  near = near * square + all(-3.33332819422e-1f);
  near = near * square * x + x;
  return size < all(0.625f) ? near : far;
}

// softcap(z + bias) / temperature of `count` logits into out, filled up with −inf to whole vectors; the derivative into
// slope, where asked. Returns the largest.
static float transform(const float* z, const float* bias, float softcap, float inverse_temperature, int64_t count,
                       float* out, float* slope) {
  Floats largest = all(-INFINITY);
  const Floats scale = all(inverse_temperature), cap = all(softcap), inverse_cap = all(1.0f / softcap);
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t here = count - i < LANES ? count - i : LANES;
    Floats x{}, b{};
    if (here == LANES) {
      x = load(z + i);
      if (bias) x += load(bias + i);
    } else {
      memcpy(&x, z + i, here * 4);
      if (bias) memcpy(&b, bias + i, here * 4);
      x += b;
    }
    Floats derivative = scale;
    if (softcap > 0) {
      x = cap * tangent(x * inverse_cap, derivative);
      derivative *= scale;
    }
    x *= scale;
    for (int64_t k = here; k < LANES; ++k) x[k] = -INFINITY;
    largest = x > largest ? x : largest;
    store(out + i, x);
    if (slope) store(slope + i, derivative);
  }
  float peak = largest[0];
  for (int64_t k = 1; k < LANES; ++k) peak = largest[k] > peak ? largest[k] : peak;
  return peak;
}

// What is left of a reference point: 0 for the −inf of a row that has seen nothing possible yet.
static inline double level_of(double peak) { return peak == -INFINITY ? 0.0 : peak; }

static void measure_row(const Rows& a, int64_t row) {
  alignas(64) float p[BLOCK], q[BLOCK];
  double* s = a.states + row * STATES;
  const float inverse_temperature = a.inverse_temperatures[row];
  const int64_t target = a.targets ? a.targets[row] - a.first : -1;
  for (int64_t start = 0; start < a.v; start += BLOCK) {
    const int64_t count = a.v - start < BLOCK ? a.v - start : BLOCK;
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    const double before = level_of(s[PEAK]), ref_before = level_of(s[REF_PEAK]);
    const float largest = transform(a.logits + row * a.stride + start, a.bias ? a.bias + start : nullptr, a.softcap,
                                    inverse_temperature, count, p, nullptr);
    if (largest > s[PEAK]) s[PEAK] = largest;
    if (target >= start && target < start + count) s[TARGET] = p[target - start];
    if (a.ref) {
      const float top = transform(a.ref + row * a.ref_stride + start, a.ref_bias ? a.ref_bias + start : nullptr,
                                  a.softcap, inverse_temperature, count, q, nullptr);
      if (top > s[REF_PEAK]) s[REF_PEAK] = top;
    }
    // Everything so far, seen from the new peaks.
    const double after = level_of(s[PEAK]), ref_after = level_of(s[REF_PEAK]);
    const double moved = before - after, ref_moved = ref_before - ref_after;
    if (a.ref && (moved != 0 || ref_moved != 0)) {
      const double total = a.reverse ? s[REF_TOTAL] : s[TOTAL];
      const double difference = a.reverse ? ref_moved - moved : moved - ref_moved;
      const double shrink = std::exp(a.reverse ? ref_moved : moved);
      if (total != 0 && s[CROSS] != INFINITY) s[CROSS] = shrink * (s[CROSS] + difference * total);
      if (s[REF_TOTAL] != 0) s[REF_TOTAL] *= std::exp(ref_moved);
    }
    if (moved != 0 && s[TOTAL] != 0) {
      s[WEIGHTED] = std::exp(moved) * (s[WEIGHTED] + moved * s[TOTAL]);
      s[TOTAL] *= std::exp(moved);
    }

    const Floats peak = all((float)after), ref_peak = all((float)ref_after), zero{};
    Floats total{}, weighted{}, ref_total{}, cross{};
    // The policy's sums are the same in both loops, to the bit: a reference that is only measured changes nothing.
    if (!a.ref) {
      for (int64_t i = 0; i < padded; i += LANES) {
        const Floats d = load(p + i) - peak, e = exponential(d);
        total += e;
        weighted += e == zero ? zero : e * d;
      }
    } else {
      for (int64_t i = 0; i < padded; i += LANES) {
        const Floats d = load(p + i) - peak, f = load(q + i) - ref_peak;
        const Floats e = exponential(d), g = exponential(f);
        total += e;
        ref_total += g;
        weighted += e == zero ? zero : e * d;
        cross += a.reverse ? (g == zero ? zero : g * (f - d)) : (e == zero ? zero : e * (d - f));
      }
    }
    s[TOTAL] += sum(total);
    s[WEIGHTED] += sum(weighted);
    s[REF_TOTAL] += sum(ref_total);
    s[CROSS] += sum(cross);
  }
}

static void gradient_row(const Rows& a, int64_t row) {
  alignas(64) float p[BLOCK], q[BLOCK], slope[BLOCK];
  const float* c = a.slopes + row * SLOPES;
  const float inverse_temperature = a.inverse_temperatures[row];
  const Floats peak = all(c[AT_PEAK]), log_total = all(c[LOG_TOTAL]), ref_peak = all(c[AT_REF_PEAK]),
               ref_log_total = all(c[REF_LOG_TOTAL]), on_softmax = all(c[ON_SOFTMAX]), on_entropy = all(c[ON_ENTROPY]),
               entropy = all(c[ENTROPY]), on_kl = all(c[ON_KL]), kl = all(c[KL]), scale = all(inverse_temperature),
               zero{};
  const int64_t target = a.targets ? a.targets[row] : -1;
  const float* logits = a.logits + row * a.stride;
  float* grad = a.grad + row * a.grad_stride;
  if (c[ON_TARGET] == 0 && c[ON_SOFTMAX] == 0 && c[ON_ENTROPY] == 0 && c[ON_KL] == 0) {  // whatever the logits are
    memset(grad, 0, a.v * 4);
    return;
  }
  for (int64_t start = 0; start < a.v; start += BLOCK) {
    const int64_t count = a.v - start < BLOCK ? a.v - start : BLOCK;
    const float* z = logits + start;
    float* out = grad + start;
    const float* bias = a.bias ? a.bias + start : nullptr;
    transform(z, bias, a.softcap, inverse_temperature, count, p, a.softcap > 0 ? slope : nullptr);
    if (a.ref)
      transform(a.ref + row * a.ref_stride + start, a.ref_bias ? a.ref_bias + start : nullptr, a.softcap,
                inverse_temperature, count, q, nullptr);
    for (int64_t i = 0; i < count; i += LANES) {
      const Floats log = (load(p + i) - peak) - log_total, prob = exponential(log);
      Floats bracket = on_softmax;
      if (c[ON_ENTROPY] != 0) bracket -= on_entropy * (log + entropy);
      if (a.ref && !a.reverse) bracket += on_kl * ((log - ((load(q + i) - ref_peak) - ref_log_total)) - kl);
      Floats g = prob == zero ? zero : prob * bracket;
      if (a.ref && a.reverse) g += on_kl * (prob - exponential((load(q + i) - ref_peak) - ref_log_total));
      g *= a.softcap > 0 ? load(slope + i) : scale;
      if (i + LANES <= count)
        store(out + i, g);
      else
        memcpy(out + i, &g, (count - i) * 4);
    }
    if (target >= start && target < start + count)
      out[target - start] += c[ON_TARGET] * (a.softcap > 0 ? slope[target - start] : inverse_temperature);
  }
}
