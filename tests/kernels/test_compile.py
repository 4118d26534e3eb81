"""torch.compile of a caller, and the contract of the custom ops beneath it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fst_kernels import linear_kl, linear_policy_loss, linear_token_logprobs, ops, policy_loss, token_logprobs

Fixture = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("backend")


def _caller(p: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Every public function, between computations of the caller's own."""
    h = torch.tanh(hidden)
    ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
    out = linear_policy_loss(
        h, weight, *p.rows, p.mask, bias=bias, weight_max=4.0, entropy_coef=0.1, kl_coef=0.1, temperature=0.7, **ref
    )
    measured = linear_token_logprobs(h, weight, p.targets, bias=bias, entropy=True, softcap=5.0)
    assert measured.entropy is not None
    kl = linear_kl(h, weight, p.ref_hidden, p.ref_weight, direction="reverse")
    given = policy_loss(measured.logprobs, p.behavior_logprobs, p.advantages, kind="ppo")
    plain = token_logprobs(h @ weight.T, p.targets)
    return out.loss + (measured.entropy + kl - plain.logprobs).sum() + given.loss, out.metrics


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_caller_compiles_into_one_graph_with_the_same_bits(make_problem: Fixture, backend: str) -> None:
    p = make_problem(20, 5, 33)
    inputs = p.hidden, p.weight, p.bias
    compiled = torch.compile(lambda *x: _caller(p, *x), fullgraph=True, backend=backend)
    (loss, metrics), (expected, expected_metrics) = compiled(*inputs), _caller(p, *inputs)
    torch.testing.assert_close(loss, expected)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics[name], value)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_loss_takes_other_numbers_of_tokens_without_new_graphs(make_problem: Fixture) -> None:
    graphs = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear_policy_loss, fullgraph=True, dynamic=True, backend=count)
    for n in (20, 31, 7):
        p = make_problem(n, 5, 33)
        args = p.hidden, p.weight, *p.rows, p.mask
        ours, expected = compiled(*args, weight_max=4.0), linear_policy_loss(*args, weight_max=4.0)
        torch.testing.assert_close(ours.loss, expected.loss)
        torch.testing.assert_close(ours.logprobs, expected.logprobs)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_ops_keep_their_contract_with_torch(make_problem: Fixture, dtype: torch.dtype, bias: bool) -> None:
    p = make_problem(9, 5, 33, dtype=dtype)
    head = p.hidden, p.weight, p.bias if bias else None
    ref = p.ref_hidden, p.ref_weight, None
    t = torch.ones(9)
    measure, backward, policy = (
        getattr(torch.ops.fst_kernels, x) for x in ("measure", "measure_backward", "policy_pass")
    )
    torch.library.opcheck(measure, (*head, None, None, None, t, 3.0, p.targets, True, True, 4, "torch"))
    torch.library.opcheck(measure, (*head, *ref, t, None, None, False, False, None, "torch"))
    frozen = tuple(None if x is None else x.detach() for x in head)
    wanted = [True, True, bias]
    slopes = [torch.ones(9), None, torch.ones(9), torch.ones(9)]
    torch.library.opcheck(backward, (*frozen, *ref, t, None, p.targets, slopes, True, 4, "torch", wanted))
    rows = p.targets, p.behavior_logprobs, p.advantages, p.mask, p.token_weights
    objective = "cispo", 0.0, 4.0, 0.2, 0.2, 0.1, 0.3
    torch.library.opcheck(policy, (*frozen, *ref, t, 3.0, *rows, *objective, 4, "torch", wanted))
    torch.library.opcheck(policy, (*frozen, *ref, t, 3.0, *rows, *objective, 4, "torch", [False, True, False]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_of_given_logits_keep_their_contract_with_torch(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    forward, backward = torch.ops.fst_kernels.measure_logits, torch.ops.fst_kernels.measure_logits_backward
    for entropy in (True, False):
        torch.library.opcheck(forward, (logits, torch.ones(9), torch.arange(9), entropy, "torch"))
    slopes = [torch.ones(9), None, torch.ones(9)]
    torch.library.opcheck(backward, (logits.detach(), torch.ones(()), torch.arange(9), slopes, "torch"))


def test_the_fake_results_are_shaped_as_the_real_ones(make_problem: Fixture) -> None:
    p = make_problem(9, 5, 33, dtype=torch.bfloat16)
    args = p.hidden, p.weight, None, None, None, None, torch.ones(()), None, p.targets, True, True, None, "torch"
    real = ops.measure(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.measure(*args)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
