"""What the package promises besides numbers: cost in products and memory, determinism, rules of autograd, errors."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fst_kernels
from fst_kernels import (
    kl_estimate,
    linear_kl,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    reference,
    token_logprobs,
)

Fixture = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("backend")
N, H, V = 96, 8, 501


@pytest.mark.parametrize(
    ("products", "frozen", "options"),
    [
        (3, (), {}),
        (3, (), {"entropy_coef": 0.1}),
        (4, (), {"kl_coef": 0.1}),
        (2, ("weight",), {}),
        (2, ("hidden",), {}),
        (1, ("hidden", "weight"), {}),
    ],
)
def test_loss_and_gradients_cost_one_pass(
    make_problem: Fixture, watcher: Any, products: int, frozen: tuple[str, ...], options: dict[str, Any]
) -> None:
    p = make_problem(N, H, V)
    for name in frozen:
        getattr(p, name).requires_grad_(False)
    ref = p.ref if "kl_coef" in options else {}
    with watcher:
        out = linear_policy_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.behavior_logprobs,
            torch.ones(N),
            weight_max=4.0,
            chunk_rows=17,
            **options,
            **ref,
        )
        if products > 1:
            out.loss.backward()
    assert watcher.multiply_adds == products * N * H * V


def test_no_gradient_is_computed_without_grad_mode(make_problem: Fixture, watcher: Any) -> None:
    p = make_problem(N, H, V)
    with watcher, torch.no_grad():
        out = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0)
    assert not out.loss.requires_grad
    assert watcher.multiply_adds == N * H * V


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_masked_and_zero_advantage_rows_take_no_gradient_products(
    make_problem: Fixture, watcher: Any, entropy_coef: float
) -> None:
    p = make_problem(N, H, V)
    with watcher:
        loss = linear_policy_loss(
            p.hidden, p.weight, *p.rows, p.mask, weight_max=4.0, entropy_coef=entropy_coef, chunk_rows=17
        ).loss
        loss.backward()
    live = int(p.mask.sum())
    learning = live if entropy_coef else int((p.mask & (p.advantages != 0)).sum())
    assert 0 < learning <= live < N
    assert watcher.multiply_adds == (live + 2 * learning) * H * V


def test_the_host_waits_for_nothing_once_the_first_product_is_launched(make_problem: Fixture, watcher: Any) -> None:
    p = make_problem(N, H, V)  # with rows that learn, that are measured alone and that are masked
    with watcher:
        out = linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, weight_max=4.0, chunk_rows=8, bias=p.bias)
        out.loss.backward()
    assert watcher.multiply_adds
    assert watcher.waits == 0


def test_compacting_zero_advantage_rows_keeps_loss_denominator_and_measures(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    moved = p.advantages + 1e-30 * (p.advantages == 0)  # not zero, so nothing is compacted
    ours = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0)
    full = linear_policy_loss(p.hidden, p.weight, p.targets, p.behavior_logprobs, moved, weight_max=4.0)
    torch.testing.assert_close(ours.loss, full.loss)
    torch.testing.assert_close(ours.logprobs, full.logprobs)
    torch.testing.assert_close(ours.entropy, full.entropy)
    for a, b in zip(*(torch.autograd.grad(x.loss, (p.hidden, p.weight)) for x in (ours, full)), strict=True):
        torch.testing.assert_close(a, b)


def _everything(p: Any, **kw: Any) -> list[torch.Tensor]:
    """All three linear ops, forward and backward: (values..., gradients...)."""
    out = linear_policy_loss(
        p.hidden, p.weight, *p.rows, p.mask, weight_max=4.0, entropy_coef=0.1, kl_coef=0.1, **p.ref, **kw
    )
    token = linear_token_logprobs(p.hidden, p.weight, p.targets, entropy=True, **kw)
    kl = linear_kl(p.hidden, p.weight, p.ref_hidden, p.ref_weight, direction="reverse", **kw)
    assert out.logprobs is not None
    assert token.entropy is not None
    total = (token.logprobs * p.advantages + token.entropy - token.logsumexp + kl).sum()
    values = [out.loss, out.logprobs, token.logprobs, token.entropy, kl]
    return values + [g for x in (out.loss, total) for g in torch.autograd.grad(x, (p.hidden, p.weight))]


def test_results_do_not_depend_on_the_chunk_size(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    whole = _everything(p, chunk_rows=10_000)
    for chunk_rows in (1, 7, 32, 96, None):
        for a, b in zip(_everything(p, chunk_rows=chunk_rows), whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_two_runs_give_the_same_bits(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    for a, b in zip(_everything(p, chunk_rows=32), _everything(p, chunk_rows=32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_stored_whole(make_problem: Fixture, watcher: Any, dtype: torch.dtype) -> None:
    p = make_problem(400, H, V, dtype=dtype)
    with watcher:
        _everything(p, chunk_rows=10)
    assert watcher.largest == max(10 * -(-V // 16) * 16, 400 * H, V * H)


def test_peak_memory_is_a_few_chunks_however_many_rows(make_problem: Fixture, watcher: Any, backend: str) -> None:
    p = make_problem(1000, 2, 2000, live=1.0)
    with watcher:
        linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, chunk_rows=50).loss.backward()
    chunk = 50 * 2000 * 4
    # In torch softmax, its log, and what is smaller; compiled, the gradient takes the place of the logits.
    assert watcher.peak_bytes <= (1.2 if backend == "cpu" else 3) * chunk


def test_autocast_does_not_round_the_logits(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    plain = _everything(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _everything(p)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradient(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    loss = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0).loss
    (3 * loss).backward(retain_graph=True)
    first = p.hidden.grad.clone(), p.weight.grad.clone()
    (3 * loss).backward()
    assert torch.equal(p.hidden.grad, 2 * first[0])
    assert torch.equal(p.weight.grad, 2 * first[1])
    torch.testing.assert_close(
        first[1] / 3,
        torch.autograd.grad(linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0).loss, p.weight)[0],
    )
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_scale_of_a_loss_is_never_rounded_to_bf16(make_problem: Fixture) -> None:
    p = make_problem(N, H, V, dtype=torch.bfloat16)
    computed_in = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.mul:
                computed_in.append(torch.result_type(*args))  # where a GPU, unlike a CPU, rounds a number to
            return func(*args, **(kwargs or {}))

    loss = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0).loss / 3
    with Products():
        loss.backward()
    assert computed_in == 2 * [torch.float32]


@pytest.mark.parametrize(
    "scalar",
    [
        lambda p: linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0).loss,
        lambda p: policy_loss(p.hidden[:, 0], p.behavior_logprobs, p.advantages, weight_max=4.0).loss,
        lambda p: linear_token_logprobs(p.hidden, p.weight, p.targets).logprobs.sum(),
        lambda p: linear_kl(p.hidden, p.weight, p.ref_hidden, p.ref_weight).sum(),
    ],
    ids=["linear_policy_loss", "policy_loss", "linear_token_logprobs", "linear_kl"],
)
def test_a_second_derivative_is_refused_not_silently_zero(make_problem: Fixture, scalar: Fixture) -> None:
    p = make_problem(5, 3, 7)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(scalar(p), p.hidden, create_graph=True)


def test_inputs_are_left_as_they_were(make_problem: Fixture) -> None:
    p, untouched = make_problem(N, H, V), make_problem(N, H, V)
    _everything(p)
    for a, b in zip(vars(p).values(), vars(untouched).values(), strict=True):
        assert torch.equal(a, b)


def test_metrics_are_detached_scalars(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    out = linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, weight_max=4.0, **p.ref)
    assert set(out.metrics) == {
        "tokens",
        "ratio_mean",
        "ratio_clipped_fraction",
        "behavior_k3_mean",
        "entropy_mean",
        "kl_mean",
    }
    for value in out.metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
    assert out.metrics["tokens"].item() == p.mask.sum().item()
    assert out.metrics["entropy_mean"].item() > 0  # measured though entropy_coef is 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_max": None}, "cispo needs weight_max"),
        ({"weight_max": 0.0}, "weight_max > 0"),
        ({"weight_min": 5.0}, "weight_min <= weight_max"),
        ({"kind": "grpo"}, "kind='grpo'"),
        ({"kind": "ppo", "clip_low": 2.0}, "clip_low <= 1"),
        ({"backend": "triton"}, "backend='triton'"),
        ({"backend": "cpu", "hidden": torch.ones(N, H).double()}, "backend='cpu' is not available: float64"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": torch.ones(3)}, r"temperature must be \[96\], one entry a token"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": math.inf}, "softcap must be above 0 and finite, got inf"),
        ({"temperature": torch.tensor(-1.0)}, "temperature must be above 0 and finite, got -1.0"),
        ({"entropy_coef": math.nan}, "entropy_coef must be finite, got nan"),
        ({"behavior_logprobs": None}, r"behavior_logprobs must be a tensor \[N\]"),
        ({"chunk_rows": 1.5}, "chunk_rows must be a whole number"),
        ({"denominator": 0}, "denominator"),
        ({"bias": torch.ones(3)}, "bias must be"),
        ({"kl_coef": 0.1}, "both ref_hidden and ref_weight"),
        ({"ref_hidden": torch.ones(N, H)}, "both ref_hidden and ref_weight"),
        ({"ref_hidden": torch.ones(N, H), "ref_weight": torch.ones(9, H)}, "same N tokens and V items"),
        ({"hidden": torch.ones(N, H + 1)}, "hidden must be"),
        ({"hidden": torch.ones(N, H, dtype=torch.int64)}, "hidden must be one of .* got torch.int64"),
        ({"weight": torch.ones(V, H).to(torch.float8_e4m3fn)}, "weight must be one of .* got torch.float8_e4m3fn"),
        ({"weight": torch.ones(V, H, device="meta")}, "weight must be on hidden's device, cpu, got meta"),
        ({"mask": torch.ones(N, device="meta")}, "mask must be on cpu .* got meta"),
        ({"advantages": torch.ones(N, dtype=torch.int64)}, "advantages must be floating point, got torch.int64"),
        ({"temperature": math.nan}, "temperature must be above 0 and finite, got nan"),
        ({"denominator": math.inf}, "denominator must be above 0 and finite, got inf"),
        ({"targets": torch.zeros(N, dtype=torch.int32)}, "int64"),
        ({"targets": torch.zeros(N, 1, dtype=torch.int64)}, "targets must be"),
        ({"advantages": torch.ones(N, 1)}, "advantages must be"),
        ({"behavior_logprobs": torch.ones(N - 1)}, "behavior_logprobs must be"),
        ({"mask": torch.ones(1)}, "mask must be"),
        ({"token_weights": torch.ones(1)}, "token_weights must be"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_named(make_problem: Fixture, change: dict[str, Any], message: str) -> None:
    p = make_problem(N, H, V)
    names = ("hidden", "weight", "targets", "behavior_logprobs", "advantages")
    arguments: dict[str, Any] = {name: getattr(p, name) for name in names} | {"weight_max": 4.0}
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("targets", V, rf"targets must be in \[0, {V}\) in every row that counts, got {V} in row 3"),
        ("targets", -100, "targets must be .* got -100 in row 3"),
        ("advantages", math.nan, "advantages must be finite in every row that counts, got nan in row 3"),
        ("advantages", -math.inf, "advantages must be finite .* got -inf in row 3"),
        ("behavior_logprobs", math.nan, "behavior_logprobs must be numbers in every row that counts, got nan in row 3"),
        ("token_weights", math.nan, "token_weights / denominator must be finite .* got nan in row 3"),
        ("temperature", 0.0, "temperature must be above 0 and finite in every row that counts, got 0.0 in row 3"),
        ("mask", 0.5, "mask must be 0 or 1, got 0.5 in row 3"),
    ],
)
def test_a_value_that_does_not_fit_is_named_where_it_counts_and_ignored_where_not(
    make_problem: Fixture, name: str, value: float, message: str
) -> None:
    p = make_problem(N, H, V)
    arguments: dict[str, Any] = {"targets": p.targets, "advantages": p.advantages, "token_weights": p.token_weights}
    arguments |= {"behavior_logprobs": p.behavior_logprobs, "temperature": torch.ones(N), "mask": torch.ones(N)}
    arguments[name] = arguments[name].clone()
    arguments[name][3] = value
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(p.hidden, p.weight, **arguments, weight_max=4.0)
    if name not in ("targets", "temperature"):
        given = {k: x for k, x in arguments.items() if k not in ("targets", "temperature")}
        with pytest.raises(ValueError, match=message):
            policy_loss(p.behavior_logprobs, **given, weight_max=4.0)
    if name != "mask":
        arguments["mask"][3] = 0
        assert linear_policy_loss(p.hidden, p.weight, **arguments, weight_max=4.0).loss.isfinite()


def test_wrong_targets_and_temperatures_of_logprobs_are_named(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    logits, right = torch.zeros(N, V), p.targets.clone()
    t = torch.ones(N)
    p.targets[5], t[6] = -1, math.nan
    for call in (
        lambda *args, **kw: token_logprobs(logits, *args, **kw),
        lambda *args, **kw: linear_token_logprobs(p.hidden, p.weight, *args, **kw),
    ):
        with pytest.raises(ValueError, match=r"targets must be in \[0, 501\) in every row, got -1 in row 5"):
            call(p.targets)
        with pytest.raises(ValueError, match="temperature must be above 0 and finite in every row, got nan in row 6"):
            call(right, temperature=t)


def test_a_tensor_denominator_of_zero_is_named(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    with pytest.raises(ValueError, match=r"denominator must be above 0 and finite, got 0.0"):
        linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, denominator=torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"denominator must be one number, got a tensor \[96\]"):
        linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, denominator=torch.ones(N))
    one = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, denominator=5.0)
    same = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, denominator=torch.tensor([5.0]).double())
    assert torch.equal(one.loss, same.loss)
    assert same.loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(make_problem: Fixture, dtype: torch.dtype) -> None:
    p = make_problem(N, H, V)
    expected = _everything(p)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = _everything(p)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_forward_mode_is_refused_not_silently_zero(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    weight, tangent = p.weight.detach(), torch.ones(V, H)
    for call in (
        lambda w: linear_token_logprobs(p.hidden.detach(), w, p.targets).logprobs,
        lambda w: linear_policy_loss(p.hidden.detach(), w, *p.rows, weight_max=4.0).loss,
        lambda w: token_logprobs(p.hidden.detach() @ w.T, p.targets).logprobs,
        lambda w: linear_kl(p.hidden.detach(), w, p.ref_hidden, p.ref_weight),
        lambda w: policy_loss(w[:N, 0], p.behavior_logprobs, p.advantages, weight_max=4.0).loss,
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            torch.func.jvp(call, (weight,), (tangent,))


@pytest.mark.parametrize("vmap", [torch.vmap, lambda f: torch.vmap(torch.vmap(f))], ids=["once", "twice"])
def test_gradients_inside_vmap_are_refused_not_silently_dropped(make_problem: Fixture, vmap: Fixture) -> None:
    p = make_problem(N, H, V)
    logprobs = p.behavior_logprobs.expand(2, 3, N)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return policy_loss(x, p.behavior_logprobs, p.advantages, weight_max=4.0).loss

    def losses(x: torch.Tensor) -> torch.Tensor:
        return vmap(loss)(x if vmap is not torch.vmap else x.flatten(0, 1)).flatten()

    torch.testing.assert_close(losses(logprobs), loss(logprobs[0, 0]).expand(6))
    needing = logprobs.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(losses(needing), losses(logprobs))
    compiled = torch.compile(losses, backend="eager")
    for call in (losses, compiled, torch.func.grad(lambda x: losses(x).sum())):
        with pytest.raises(RuntimeError, match=r"no gradients inside torch.vmap"):
            call(needing)


def test_a_reference_of_another_dtype_is_taken_in_the_policys(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    args: dict[str, Any] = {"kl_coef": 0.1, "weight_max": 4.0}
    for dtype in (torch.float64, torch.bfloat16):
        hidden, weight = p.ref_hidden.to(dtype), p.ref_weight.to(dtype)
        kl = linear_kl(p.hidden, p.weight, hidden, weight)
        truth = reference.linear_kl(p.hidden, p.weight, hidden, weight)
        torch.testing.assert_close(kl, truth.float(), atol=1e-5, rtol=1e-5)
        out = linear_policy_loss(p.hidden, p.weight, *p.rows, ref_hidden=hidden, ref_weight=weight, **args)
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.kl, truth.float(), atol=1e-5, rtol=1e-5)


def test_the_other_functions_reject_what_does_not_fit(make_problem: Fixture) -> None:
    p = make_problem(N, H, V)
    with pytest.raises(ValueError, match="cispo needs weight_max"):
        policy_loss(p.behavior_logprobs, p.behavior_logprobs, p.advantages)
    with pytest.raises(ValueError, match="advantages must be"):
        policy_loss(p.behavior_logprobs, p.behavior_logprobs, p.advantages[1:], weight_max=4.0)
    with pytest.raises(ValueError, match="direction='sideways'"):
        linear_kl(p.hidden, p.weight, p.hidden, p.weight, direction="sideways")
    with pytest.raises(ValueError, match=r"same shape, got \[96\] and \[95\]"):
        kl_estimate(p.advantages, p.advantages[1:])
    with pytest.raises(ValueError, match="kind='k4'"):
        kl_estimate(p.advantages, p.advantages, "k4")
    with pytest.raises(ValueError, match="logits must be"):
        token_logprobs(p.advantages, p.targets)
    with pytest.raises(ValueError, match=r"V ≥ 1 .* got \[96, 0\]"):
        token_logprobs(p.hidden[:, :0], p.targets)
    with pytest.raises(ValueError, match="backend='triton'"):
        linear_token_logprobs(p.hidden, p.weight, p.targets, backend="triton")


def test_empty_inputs_give_empty_outputs_and_zero_gradients(make_problem: Fixture) -> None:
    p = make_problem(0, H, V)
    loss, logprobs, token_logp, entropy, kl, *gradients = _everything(p)
    assert loss.item() == 0
    assert logprobs.shape == token_logp.shape == entropy.shape == kl.shape == (0,)
    assert not any(g.any() for g in gradients)


def test_the_package_stands_alone() -> None:
    root = Path(fst_kernels.__file__).parents[1]
    others = "'fst_fast', 'transformers', 'vllm', 'triton', 'torch.distributed.tensor'"
    code = f"import sys, fst_kernels; print({{{others}}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
