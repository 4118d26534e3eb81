"""What the kernel tests share: random problems, comparison with the float64 reference, and a watcher of torch."""

import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from fst_kernels import PolicyLoss, api, cpu_backend, reference
from fst_kernels.types import arithmetic_dtype

not_built = pytest.mark.skipif(cpu_backend.LIBRARY is None, reason="fst_kernels._csrc is not built")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then "auto" means triton on a CPU: any test tests it

if INTERPRETED:
    # Triton's interpreter replaces its language's functions for every jitted function, and for those that this one
    # calls looks through all of them again, in vain: two fifths of its time.
    from triton.runtime import interpreter

    _replace, _first = interpreter._patch_builtin, dict[object, str]()

    def _replace_once(package: Any, *args: Any) -> None:
        is_builtin = interpreter.tl.core.is_builtin
        if package not in _first:
            _first[package] = next((n for n, x in inspect.getmembers(package) if is_builtin(x)), "__name__")
        if is_builtin(getattr(package, _first[package])):
            _replace(package, *args)

    interpreter._patch_builtin = _replace_once


@pytest.fixture(scope="module", params=["triton"] if INTERPRETED else ["torch", pytest.param("cpu", marks=not_built)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What "auto" means in a module that uses this fixture: every test in it runs once with each backend."""

    def best(*operands: Tensor) -> str:
        return request.param if arithmetic_dtype(*operands) == torch.float32 else "torch"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_best", best)
        yield request.param


@dataclass
class Problem:
    """Arguments of linear_policy_loss. `behavior_logprobs` lie around the policy's own, so that ρ is around 1."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    token_weights: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    @property
    def rows(self) -> tuple[Tensor, ...]:
        return self.targets, self.behavior_logprobs, self.advantages

    @property
    def ref(self) -> dict[str, Tensor]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}


def _make_problem(
    n: int, h: int, v: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0, live: float = 0.8
) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden = (randn(n, h) * scale / h**0.5).to(dtype)
    weight, bias = randn(v, h).to(dtype), randn(v)
    targets = torch.randint(v, (n,), generator=g)
    logprobs = reference.linear_token_logprobs(hidden, weight, targets).logprobs.float()
    advantages = randn(n) * (torch.rand(n, generator=g) < 0.7)
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        bias=(bias.double() if dtype == torch.float64 else bias).requires_grad_(),
        targets=targets,
        behavior_logprobs=logprobs + randn(n),
        advantages=advantages,
        mask=torch.rand(n, generator=g) < live,
        token_weights=torch.rand(n, generator=g),
        ref_hidden=(randn(n, h) * scale / h**0.5).to(dtype),
        ref_weight=randn(v, h).to(dtype),
    )


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    return _make_problem


def _assert_close(ours: Tensor, truth: Tensor, *, absolute: float, relative: float = 0.0) -> None:
    """|ours − truth| ≤ absolute + relative · max|truth|, and both finite."""
    assert torch.isfinite(ours).all()
    assert ours.shape == truth.shape
    if truth.numel():
        error, size = (ours.double() - truth.double()).abs().max().item(), truth.abs().max().item()
        assert error <= absolute + relative * size, f"error {error:.2e} at size {size:.2e}"


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    return _assert_close


@pytest.fixture(scope="session")
def assert_same_loss() -> Callable[..., None]:
    """Values, metrics and gradients of a fused loss against the reference's: what kernels.md promises for fp32."""

    def check(
        ours: PolicyLoss, truth: PolicyLoss, inputs: tuple[Tensor, ...], forward: float = 1e-5, gradient: float = 1e-5
    ) -> None:
        assert ours.metrics.keys() == truth.metrics.keys()
        size = max(1.0, *(m.abs().item() for m in truth.metrics.values()), truth.loss.abs().item())
        _assert_close(ours.loss, truth.loss, absolute=forward * size)
        for name, value in truth.metrics.items():
            _assert_close(ours.metrics[name], value, absolute=forward * size)
        for name in ("logprobs", "entropy", "kl"):
            value, expected = getattr(ours, name), getattr(truth, name)
            assert (value is None) == (expected is None)
            if expected is not None:
                assert not value.requires_grad
                _assert_close(value, expected, absolute=forward, relative=2e-6)
        # The gradient of a KL is p (log p − log q − KL): it may cancel, but only down to what fp32 keeps of the KL.
        largest = max((x.abs().max().item() for x in (*inputs, truth.kl) if x is not None and x.numel()), default=0)
        rounding = 1e-7 * max(1.0, largest) ** 2
        for g, expected in zip(
            torch.autograd.grad(ours.loss, inputs, retain_graph=True),
            torch.autograd.grad(truth.loss, inputs),
            strict=True,
        ):
            _assert_close(g, expected, absolute=rounding, relative=gradient)

    return check


class Watcher(TorchDispatchMode):
    """Records the multiply-adds of matrix products, the largest tensor made, the peak of live bytes made, and how often
    a host would have waited for a GPU once the first product was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = self.largest = self.live_bytes = self.peak_bytes = self.waits = 0
        self._seen: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fst_kernels":  # an op of ours is one call to torch: look inside
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        ours = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        if func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense):
            self.waits += self.multiply_adds > 0
        for x in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in ours and key not in self._seen:
                self._seen.add(key)
                self.largest = max(self.largest, x.numel())
                self.live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._forget, key, size)
        return out


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()
