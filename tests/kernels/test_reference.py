"""The reference against torch's own distributions and against closed forms: nothing else checks the definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from fst_kernels import reference


@pytest.fixture
def logits() -> Tensor:
    return (3 * torch.randn(9, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).requires_grad_()


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(31, (9,), generator=torch.Generator().manual_seed(2))


def test_logprobs_entropy_and_logsumexp_are_those_of_torch(logits: Tensor, targets: Tensor) -> None:
    ours = reference.token_logprobs(logits, targets, temperature=0.7, entropy=True)
    torch.testing.assert_close(ours.logprobs, -F.cross_entropy(logits / 0.7, targets, reduction="none"))
    torch.testing.assert_close(ours.entropy, Categorical(logits=logits / 0.7).entropy())
    torch.testing.assert_close(ours.logsumexp, (logits / 0.7).exp().sum(-1).log())


def test_linear_logits_are_capped_then_divided_by_each_tokens_temperature(targets: Tensor) -> None:
    hidden, weight, bias = torch.randn(9, 4), torch.randn(31, 4), torch.randn(31)
    t = torch.linspace(0.5, 2, 9)
    z = 5 * torch.tanh(F.linear(hidden.double(), weight.double(), bias.double()) / 5) / t.double()[:, None]
    ours = reference.linear_token_logprobs(hidden, weight, targets, bias=bias, temperature=t, softcap=5.0)
    torch.testing.assert_close(ours.logprobs, F.log_softmax(z, -1).gather(1, targets[:, None]).squeeze(1))


def test_kl_is_that_of_torch_in_both_directions() -> None:
    (hp, hq), (wp, wq) = torch.randn(2, 9, 4).double(), torch.randn(2, 31, 4).double()
    p, q = Categorical(logits=hp @ wp.T / 2), Categorical(logits=hq @ wq.T / 2)
    forward = reference.linear_kl(hp, wp, hq, wq, temperature=2.0)
    reverse = reference.linear_kl(hp, wp, hq, wq, temperature=2.0, direction="reverse")
    torch.testing.assert_close(forward, kl_divergence(p, q))
    torch.testing.assert_close(reverse, kl_divergence(q, p))


def test_impossible_items_count_nothing_in_entropy_and_kl() -> None:
    # Two of four items forbidden: entropy ln 2, and KL(uniform on 2 ‖ (1/4, 3/4) on the same 2) by hand.
    bias = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    other = torch.tensor([math.log(0.25), math.log(0.75), -math.inf, -math.inf])
    hidden, weight = torch.zeros(1, 1), torch.zeros(4, 1, requires_grad=True)
    entropy = reference.linear_token_logprobs(hidden, weight, torch.tensor([0]), bias=bias, entropy=True).entropy
    kl = reference.linear_kl(hidden, weight, hidden, weight, bias_p=bias, bias_q=other)
    assert entropy is not None
    assert entropy.item() == pytest.approx(math.log(2))
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    (entropy + kl).sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize(
    ("kind", "ratio", "advantage", "loss", "slope"),
    [
        ("cispo", 2.0, 3.0, -2 * 3 * math.log(0.5), -2 * 3),
        ("cispo", 8.0, 3.0, -4 * 3 * math.log(0.5), -4 * 3),  # above weight_max = 4: bounded, never zeroed
        ("cispo", 0.1, 3.0, -0.5 * 3 * math.log(0.5), -0.5 * 3),  # below weight_min = 0.5
        ("ppo", 1.1, 3.0, -1.1 * 3, -1.1 * 3),
        ("ppo", 2.0, 3.0, -1.3 * 3, 0),  # above 1 + clip_high = 1.3
        ("ppo", 2.0, -3.0, 2 * 3, 2 * 3),  # the pessimistic side keeps its gradient
        ("ppo", 0.5, -3.0, 0.8 * 3, 0),  # below 1 − clip_low = 0.8
        ("reinforce", 2.0, 3.0, -3 * math.log(0.5), -3),
    ],
)
def test_objectives_by_hand(kind: str, ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    behavior = logprobs.detach() - math.log(ratio)
    ours = reference.policy_loss(
        logprobs, behavior, torch.tensor([advantage]), kind=kind, weight_min=0.5, weight_max=4.0, clip_high=0.3
    )
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope)
    assert ours.metrics["ratio_mean"].item() == pytest.approx(ratio)
    assert ours.metrics["ratio_clipped_fraction"].item() == float(
        ratio not in (1.1,) and abs(slope) != ratio * 3 and kind != "reinforce"
    )
    assert ours.metrics["behavior_k3_mean"].item() == pytest.approx(ratio - 1 - math.log(ratio))


def test_loss_gradient_in_the_logits_is_coefficient_times_softmax_minus_onehot(targets: Tensor) -> None:
    # hidden = identity, so that the weight's gradient is the transposed gradient of the logits.
    z = torch.randn(31, 9, dtype=torch.float64, requires_grad=True)
    p = z.detach().T.softmax(-1)
    behavior, advantages = p[torch.arange(9), targets].log() - 0.3, torch.randn(9).double()
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1])
    loss = reference.linear_policy_loss(
        torch.eye(9).double(), z, targets, behavior, advantages, mask, weight_max=4.0, entropy_coef=0.2
    ).loss
    loss.backward()
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    by_hand = math.exp(0.3) * advantages[:, None] * (p - F.one_hot(targets, 31)) + 0.2 * p * (p.log() + entropy)
    assert z.grad is not None
    torch.testing.assert_close(z.grad.T, by_hand * mask[:, None] / 7)


def test_entropy_and_kl_terms_are_added_to_the_objective(targets: Tensor) -> None:
    torch.manual_seed(3)
    hidden, weight, ref_hidden, ref_weight = (torch.randn(*s) for s in ((9, 4), (31, 4), (9, 4), (31, 4)))
    behavior, advantages, weights = -3 * torch.rand(9), torch.randn(9), torch.rand(9)
    args = hidden, weight, targets, behavior, advantages
    plain = reference.linear_policy_loss(*args, kind="reinforce", token_weights=weights, denominator=5)
    full = reference.linear_policy_loss(
        *args,
        kind="reinforce",
        token_weights=weights,
        denominator=5,
        entropy_coef=0.3,
        kl_coef=0.7,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
    )
    logs = F.log_softmax(hidden.double() @ weight.double().T, -1)
    p, q = Categorical(logits=logs), Categorical(logits=ref_hidden.double() @ ref_weight.double().T)
    policy = -(weights * advantages * logs.gather(1, targets[:, None]).squeeze(1)).sum() / 5
    extra = (weights * (0.7 * kl_divergence(p, q) - 0.3 * p.entropy())).sum() / 5
    torch.testing.assert_close(plain.loss, policy)
    torch.testing.assert_close(full.loss, policy + extra)
