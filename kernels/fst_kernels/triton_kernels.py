"""The row kernel: one program measures one row of logits and turns it into its gradient; two reads, one write.

First pass: running maximum, sum and expectations, of a thread's neighbours together, joined at the end. Between the
passes the row's log-prob gives its ratio and coefficient (`Objective`, in scalars). Second pass: the gradient, over the
logits.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # where maxima start: unlike −inf, finite minus it is never NaN
FAR = tl.constexpr(
    1e30
)  # as good as inf under exp; a few thousand of them still have a finite sum, and 0 times it is 0


@triton.jit
def _exp(d):
    """e^d for d ≤ 0, 0 below 1e-38: tl.exp takes three more instructions an item for what lies there."""
    return tl.exp2(d * 1.4426950408889634)


@triton.jit
def _tanh(u):
    e = _exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(u < 0, -far, far)
    s = u * u  # near 0 that cancels: Cephes' tanhf polynomial
    near = -5.70498872745e-3 * s + 2.06390887954e-2
    near = near * s - 5.37397155531e-2
    near = near * s + 1.33314422036e-1
    near = near * s - 3.33332819422e-1
    return tl.where(tl.abs(u) < 0.625, near * s * u + u, far)


@triton.jit
def _read(logits, bias, at, width, V):
    """The head's logits at these columns; anything from V on."""
    z = tl.load(logits + at, mask=at < width, other=0.0).to(
        tl.float32
    )  # width keeps the vector loads that a mask of V would break
    if bias is not None:
        z += tl.load(bias + at, mask=at < V, other=0.0).to(tl.float32)
    return z


@triton.jit
def _divide(z, c):
    """z / c as `divide` of row_cluster.cu: to nearest for |z| > 1e-30 and c > 3e-39; ±inf and NaN stay."""
    inverse = tl.div_rn(1.0, c)
    q = z * inverse
    better = tl.fma(tl.fma(-q, c, z), inverse, q)
    return tl.where(tl.abs(better) <= -LOWEST, better, q)


@triton.jit
def _shape(z, temperature, softcap, at, V, CAPPED: tl.constexpr):
    """Logits after softcap and temperature; −inf from V on."""
    if CAPPED:
        z = softcap * _tanh(_divide(z, softcap))
    if temperature is not None:
        z = _divide(z, temperature)  # `/` may be 2 ulp off: 8e-6 at a logit of 40
    return tl.where(at < V, z, float("-inf"))


@triton.jit
def _near(d):
    """Differences no further than FAR from 0."""
    return tl.minimum(tl.maximum(d, -FAR), FAR)


@triton.jit
def _product(weight, value):
    """weight · value, 0 where the weight is 0 whatever the value: items of probability 0 count nothing."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _slope(logprob, behavior, advantage, low, high, KIND: tl.constexpr):
    """d loss / d log-prob of one token: `Objective.terms`. Written with `where`, which keeps a NaN."""
    log_ratio = logprob - behavior
    ratio = tl.exp(tl.where(log_ratio > 20.0, 20.0, log_ratio))
    weight = tl.where(ratio < low, low, ratio)
    weight = tl.where(weight > high, high, weight)
    if KIND == "ppo":
        flat = (ratio * advantage > weight * advantage) | (log_ratio > 20.0)
        return tl.where(flat, 0.0, -ratio * advantage)
    if KIND == "cispo":
        return -weight * advantage
    return -advantage


@triton.jit
def row_kernel(
    logits,  # (n, width) fp32, or as they are given: V logits and padding of any content
    ref_logits,  # the same of the KL's reference, or None
    bias,  # (V,) or None
    ref_bias,
    grad,  # (n, width) no wider than logits, may be their storage; None: measure only
    targets,  # (n,) int64 or None
    temperature,  # (n,) or None
    logprobs_out,  # (n,) each, None where nobody asks
    entropy_out,
    kl_out,
    logsumexp_out,
    of_logprobs,  # (n,) slopes of the loss in the four measures, None for 0
    of_entropy,
    of_kl,
    of_logsumexp,
    behavior,  # (n,) what the slope in the log-prob is made of, unless KIND is "given"
    advantages,
    weights,
    low,  # the ratio's bounds
    high,
    softcap,
    V,
    width,
    stride,  # between rows
    ref_stride,
    grad_stride,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    FORWARD_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,  # items of 16 bytes, a thread's in one load
    NEIGHBOURS: tl.constexpr,  # rows begin and end at 16 items; else a load is of one, the next thread's beside it
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if ref_logits is not None:
        ref_logits += row * ref_stride
    if temperature is not None:
        temperature = tl.load(temperature + row)
    # RUN items lie in one thread and share a state: what joins them needs no other thread.
    RUNS: tl.constexpr = BLOCK // RUN
    if NEIGHBOURS:
        runs = tl.arange(0, RUNS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    else:
        runs = tl.arange(0, RUNS)[:, None] + tl.arange(0, RUN)[None, :] * RUNS
    peak = tl.full([RUNS], LOWEST, tl.float32)
    total = tl.zeros([RUNS], tl.float32)  # Σ exp(x − peak)
    moment = tl.zeros([RUNS], tl.float32)  # Σ exp(x − peak) (x − peak)
    gap = tl.zeros([RUNS], tl.float32)  # Σ exp(x − peak) (x − y), y of the reference; reverse KL: x and y swapped
    lost = tl.full([RUNS], float("-inf"), tl.float32)  # max x where y is −inf: above −inf, the KL is infinite
    ref_peak = tl.full([RUNS], LOWEST, tl.float32)
    ref_total = tl.zeros([RUNS], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + runs
        x = _shape(_read(logits, bias, at, width, V), temperature, softcap, at, V, CAPPED)
        raised = tl.maximum(peak, tl.max(x, 1))
        moved = tl.maximum(peak - raised, -FAR)
        scale = _exp(moved)
        peak = raised
        d = x - peak[:, None]
        e = _exp(d)
        if entropy_out is not None or of_entropy is not None:
            moment = scale * (moment + moved * total) + tl.sum(e * tl.maximum(d, -FAR), 1)
        total = scale * total + tl.sum(e, 1)
        if ref_logits is not None:
            y = _shape(_read(ref_logits, ref_bias, at, width, V), temperature, softcap, at, V, CAPPED)
            raised = tl.maximum(ref_peak, tl.max(y, 1))
            ref_scale = _exp(tl.maximum(ref_peak - raised, -FAR))
            ref_peak = raised
            ref_e = _exp(y - ref_peak[:, None])
            ref_total = ref_scale * ref_total + tl.sum(ref_e, 1)
            if FORWARD_KL:
                gap = scale * gap + tl.sum(e * _near(x - tl.maximum(y, LOWEST)), 1)
                lost = tl.maximum(lost, tl.max(tl.where(y == float("-inf"), x, float("-inf")), 1))
            else:
                gap = ref_scale * gap + tl.sum(ref_e * _near(y - tl.maximum(x, LOWEST)), 1)
                lost = tl.maximum(lost, tl.max(tl.where(x == float("-inf"), y, float("-inf")), 1))

    target = -1
    if targets is not None:  # before the joins: no thread is past them and writes a gradient here until all have read
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < V)
        place = tl.where(inside, target, 0)
        chosen = _shape(_read(logits, bias, place, width, V), temperature, softcap, place, V, CAPPED)

    row_peak = tl.max(peak, 0)
    scale = tl.exp(peak - row_peak)
    row_total = tl.sum(scale * total, 0)
    log_total = tl.log(row_total)
    entropy = 0.0
    if entropy_out is not None or of_entropy is not None:
        entropy = log_total - tl.sum(scale * (moment + _near(peak - row_peak) * total), 0) / row_total
    kl, ref_row_peak, ref_log_total = 0.0, 0.0, 0.0
    if ref_logits is not None:
        ref_row_peak = tl.max(ref_peak, 0)
        ref_scale = tl.exp(ref_peak - ref_row_peak)
        ref_row_total = tl.sum(ref_scale * ref_total, 0)
        ref_log_total = tl.log(ref_row_total)
        if FORWARD_KL:
            kl = tl.sum(scale * gap, 0) / row_total + (ref_row_peak - row_peak) + (ref_log_total - log_total)
        else:
            kl = tl.sum(ref_scale * gap, 0) / ref_row_total + (row_peak - ref_row_peak) + (log_total - ref_log_total)
        kl += tl.where(tl.max(lost, 0) > float("-inf"), float("inf"), 0.0)
    logprob = 0.0
    if targets is not None:
        logprob = tl.where(inside, chosen - row_peak - log_total, float("nan"))

    if logprobs_out is not None:
        tl.store(logprobs_out + row, logprob)
    if entropy_out is not None:
        tl.store(entropy_out + row, entropy)
    if kl_out is not None:
        tl.store(kl_out + row, kl)
    if logsumexp_out is not None:
        tl.store(logsumexp_out + row, row_peak + log_total)

    if grad is not None:
        grad += row * grad_stride
        on_target, on_entropy, on_kl, on_probs = 0.0, 0.0, 0.0, 0.0
        if KIND != "given":
            slope = _slope(logprob, tl.load(behavior + row), tl.load(advantages + row), low, high, KIND)
            on_target = tl.load(weights + row) * slope
        elif of_logprobs is not None:
            on_target = tl.load(of_logprobs + row)
        if of_logsumexp is not None:
            on_probs = tl.load(of_logsumexp + row)
        idle = (on_target == 0) & (on_probs == 0)
        on_probs -= on_target
        if of_entropy is not None:
            on_entropy = tl.load(of_entropy + row)
            idle = idle & (on_entropy == 0)
            on_probs -= on_entropy * entropy
        if of_kl is not None:
            on_kl = tl.load(of_kl + row)
            idle = idle & (on_kl == 0)
            if FORWARD_KL:
                on_probs -= on_kl * kl
            else:
                on_probs += on_kl
        lanes = tl.arange(0, BLOCK)
        for start in range(0, V, BLOCK):
            at = start + lanes
            z = _read(logits, bias, at, width, V)
            x = _shape(z, temperature, softcap, at, V, CAPPED) - row_peak
            probs = _exp(x) * (1.0 / row_total)
            logs = x - log_total
            on_item = tl.full([BLOCK], 0.0, tl.float32) + on_probs
            if of_entropy is not None:
                on_item -= on_entropy * logs
            ref_probs = tl.zeros([BLOCK], tl.float32)
            if of_kl is not None:
                y = _shape(_read(ref_logits, ref_bias, at, width, V), temperature, softcap, at, V, CAPPED)
                y -= ref_row_peak
                if FORWARD_KL:
                    on_item += on_kl * (logs - (y - ref_log_total))
                else:
                    ref_probs = _exp(y - ref_log_total)
            g = _product(probs, on_item) - on_kl * ref_probs + tl.where(at == target, on_target, 0.0)
            if temperature is not None:
                g *= 1.0 / temperature
            if CAPPED:
                e = _exp(-2.0 * tl.abs(_divide(z, softcap)))
                g *= 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 − tanh² would lose its digits where the cap saturates
            g = tl.where(idle, 0.0, g)
            if grad.dtype.element_ty != logits.dtype.element_ty:
                # A narrower gradient of a row in its own logits' storage reaches back over logits that other threads
                # of this program read a block ago, never over ones still to be read.
                tl.debug_barrier()
            tl.store(grad + at, g.to(grad.dtype.element_ty), mask=at < width)
