"""What hardware can do: rates.json, every number with its source, and the roofline that turns rates into seconds.

A rate is replaced by a measured one with `python benchmarks/rates.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fst_fast.shape import PassWork, Shape

if TYPE_CHECKING:
    import torch

TABLE = Path(__file__).parent / "rates.json"


@dataclass(frozen=True)
class Rate:
    value: float
    source: str  # where it was measured, or that it was not


@dataclass(frozen=True)
class Hardware:
    """One kind of device. Units are in the rates' names; `*_mfu` and `*_reached` are parts of the peak."""

    name: str
    rates: Mapping[str, Rate]

    def __getitem__(self, rate: str) -> float:
        return self.rates[rate].value

    @property
    def bandwidth(self) -> float:
        """Bytes a second that decoding reads."""
        return self["bandwidth_tbs"] * 1e12 * self["bandwidth_reached"]

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self["peak_tflops"] * 1e12


def read_table(path: Path = TABLE) -> dict[str, Hardware]:
    table = json.loads(path.read_text())
    return {name: Hardware(name, {k: Rate(**rate) for k, rate in rates.items()}) for name, rates in table.items()}


def kind_of(device_name: str) -> str:
    """The table's name of a GPU by the driver's, "NVIDIA H100 80GB HBM3" → h100; "" when it has none."""
    return next((kind for kind in read_table() if kind != "cpu" and kind in device_name.lower()), "")


def peak_flops(device: torch.device, tflops: float) -> float:
    """FLOP/s at best of a run's device: `tflops` if given, else by the table; 0 = unknown."""
    import torch

    if tflops or device.type != "cuda":
        return tflops * 1e12
    kind = kind_of(torch.cuda.get_device_name(device))
    return read_table()[kind].peak if kind else 0.0


@dataclass(frozen=True)
class Lengths:
    """Mean tokens: of the whole context, of what of it no other request shares, of responses; and the longest."""

    context: float
    own: float
    response: float
    longest: int

    @property
    def work(self) -> PassWork:
        """Of one forward pass over a rollout, alone."""
        return PassWork.over([(0, round(self.context) + round(self.response))], round(self.response))


@dataclass(frozen=True)
class Roofline:
    """Seconds by arithmetic: decoding reads weights and KV, everything else multiplies (as in benchmarks/simulator.py).

    `gpus` work side by side; `bytes` a weight. Every method takes whole-run-wide counts of rollouts.
    """

    shape: Shape
    hardware: Hardware
    lengths: Lengths
    gpus: int
    shards: int  # GPUs that share the trainer's state
    bytes: int
    batch: int  # sequences a GPU decodes together
    eager: bool  # the embedded engine: transformers layers, launched one by one
    kl: bool
    recompute: float  # forward passes repeated in the backward pass
    offload: bool
    sharing: tuple[float, float] = (1.0, 1.0)  # rollouts of a packed pass under one prompt, and on one problem too

    def rollouts(self, count: float) -> float:
        """Of one batch: prefill, then as many iterations as the longest response has, each reading all weights.

        Responses are taken as lognormal with sigma .8: a token's context is longer by about the mean response.
        """
        if not count:
            return 0.0
        s, h, n = self.shape, self.hardware, self.lengths
        each = count / self.gpus
        iterations = n.longest + n.response * max(0.0, each / self.batch - 1)
        tokens = each * n.response
        weights = self.bytes * (s.body + s.head) / h.bandwidth  # seconds to read them
        if self.eager:
            weights = max(weights, s.layers * h["torch_layer_us"] * 1e-6)
        decoding = iterations * weights + tokens * self.bytes * s.kv_elements * (n.context + n.response) / h.bandwidth
        host = 1e-6 * tokens * h["sequence_us"]
        prefill = 2.0 * s.body * each * n.own / (h.peak * h["prefill_mfu"])
        if self.eager:
            return prefill + decoding + host
        return prefill + max(decoding, host + 1e-6 * iterations * h["iteration_us"])  # vLLM's host works ahead

    def forward(self, count: float) -> float:
        """Of one pass without gradient."""
        flops = count * self.shape.forward_flops(self.lengths.work)
        return flops / (self.gpus * self.hardware.peak * self.hardware["prefill_mfu"])

    def learn(self, count: float, updates: int) -> float:
        """Forward and backward passes over the rollouts that carry a gradient, the base's for the KL, the updates."""
        n, (under_prompt, on_problem) = self.lengths, self.sharing
        forward = count * self.shape.forward_flops(n.work)
        spared = (n.context - n.own) * (1 - 1 / under_prompt) + n.own * (1 - 1 / on_problem)
        forward -= count * 2.0 * self.shape.body * spared  # attention's few FLOPs over them are not
        passes = 3 + self.recompute + self.kl
        share = self.shape.parameters / self.shards
        # AdamW reads and writes masters, moments and gradient: 28 bytes a parameter; offloaded, over PCIe and in RAM
        update = 28 * share / (self.hardware["pcie_gbs"] * 1e9 if self.offload else self.hardware.bandwidth)
        return passes * forward / (self.gpus * self.hardware.peak * self.hardware["train_mfu"]) + updates * update

    def sync(self) -> float:
        """New weights into the engines: gathered from all ranks, the engine asleep and awake again."""
        if self.eager and self.gpus == 1:
            return 0.0
        size = self.bytes * self.shape.parameters
        gathered = size / (self.hardware["link_gbs"] * 1e9) if self.gpus > 1 else 0.0
        return gathered + size / (self.hardware["pcie_gbs"] * 1e9)

    def checkpoint(self) -> float:
        """Weights, masters and moments at 2 GB/s a GPU (assumed)."""
        return self.shape.parameters * (self.bytes + 12) / self.gpus / 2e9

    def reflect(self, proposals: float, at_once: float) -> float:
        """Of `proposals` asked of an endpoint, so many at once."""
        return -(-proposals // at_once) * self.hardware["reflect_seconds"] if proposals else 0.0
