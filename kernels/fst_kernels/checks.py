"""What must hold of the numbers in a call: one read from the device, one sentence that names the first wrong one."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import PolicyRows


class Rule(NamedTuple):
    name: str
    expected: str
    values: Tensor  # (n,)
    wrong: Tensor  # (n,) bool


def require(*rules: Rule) -> None:
    """Raise ValueError on the first rule that some row breaks. In a graph of torch.compile nothing is looked at."""
    if torch.compiler.is_compiling():
        return
    if not bool(torch.stack([x.wrong.any() for x in rules]).any()):
        return
    broken = next(x for x in rules if x.wrong.any())
    row = int(broken.wrong.nonzero()[0])
    raise ValueError(f"{broken.name} must be {broken.expected}, got {broken.values[row].item()} in row {row}")


def target_rules(targets: Tensor | None, v: int, temperature: Tensor, live: Tensor | None = None) -> Iterator[Rule]:
    every = "in every row that counts" if live is not None else "in every row"
    if targets is not None:
        wrong = (targets < 0) | (targets >= v)
        yield Rule("targets", f"in [0, {v}) {every}", targets, wrong if live is None else wrong & live)
    if temperature.ndim:
        wrong = ~((temperature > 0) & temperature.isfinite())
        yield Rule("temperature", f"above 0 and finite {every}", temperature, wrong if live is None else wrong & live)


def policy_rules(batch: PolicyRows) -> Iterator[Rule]:
    """Of rows that count; the others may hold anything."""
    finite = "finite in every row that counts"
    for name, values in (("advantages", batch.advantages), ("token_weights / denominator", batch.weights)):
        yield Rule(name, finite, values, batch.live & ~values.isfinite())
    behavior = batch.behavior_logprobs
    yield Rule("behavior_logprobs", "numbers in every row that counts", behavior, batch.live & behavior.isnan())


def denominator_rules(denominator: Tensor) -> Iterator[Rule]:
    yield Rule("denominator", "above 0 and finite", denominator, ~((denominator > 0) & denominator.isfinite()))


def mask_rules(mask: Tensor) -> Iterator[Rule]:
    yield Rule("mask", "0 or 1", mask, (mask != 0) & (mask != 1))
