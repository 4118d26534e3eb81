"""The compiled CPU backend: torch's products into a block of fp32 logits, csrc/policy_rows.cpp over its rows in place.

Logits that need no gradient exist one tile (rows × vocabulary items) at a time. First the library, then a head's
products and a block of rows, then the three ops of a backend.
"""

import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .blocks import Gradients, Measures, PolicyPass
from .objective import PolicyRows
from .types import Head

LEVELS = "baseline", "avx2", "avx512"
# Of a pass with gradients, 64 MiB: every block reads and writes the weight's gradient, and casts a bf16 head twice.
BLOCK_LOGITS = 2**24
TILE_LOGITS = 2**21  # of a forward pass without gradient: 8 MiB
TILE_ROWS = 1024


def refusal(head: Head) -> str | None:
    """Why this backend cannot take these tensors; None if it can."""
    if head.hidden.device.type != "cpu" or head.weight.device.type != "cpu":
        return f"hidden and weight are on {head.hidden.device} and {head.weight.device}"
    if head.dtype == torch.float64:
        return "float64 is the torch backend's"
    if library() is None:
        return "fst_kernels._csrc is not built (no C++ compiler at install?)"
    return None


# ---- the library ---------------------------------------------------------------------------------------------------


class _Rows(ctypes.Structure):
    """Rows of csrc/policy_rows.cpp."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("v", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("ref", ctypes.c_void_p),
        ("ref_stride", ctypes.c_int64),
        ("ref_bias", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("inverse_temperatures", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("softcap", ctypes.c_float),
        ("reverse", ctypes.c_int32),
    )


class _Library:
    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self.measure, self.gradient = library.fst_rows_measure, library.fst_rows_gradient
        for function in (self.measure, self.gradient):
            function.argtypes = [ctypes.POINTER(_Rows), ctypes.c_int, ctypes.c_int]
            function.restype = None
        self.best_level: int = library.fst_rows_level()
        self.level = self.best_level  # index into LEVELS; tests lower it


@functools.cache
def library() -> _Library | None:
    """The compiled code, loaded once; None where the install had no compiler."""
    spec = importlib.util.find_spec(f"{__package__}._csrc")
    return None if spec is None or spec.origin is None else _Library(spec.origin)


# ---- a head's products, and the softmax of a block of rows ---------------------------------------------------------


class _Multiplier:
    """A head's products, in fp32: operands of less are cast a tile at a time, so that no copy of the head exists."""

    def __init__(self, head: Head) -> None:
        self.source = head
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        inverse = (1 / head.temperature.double()).float()
        self.inverse_temperatures = inverse.expand(len(head.hidden))

    def inputs(self, rows: Tensor) -> Tensor:
        return self.source.hidden[rows].float()  # (n, H)

    @property
    def columns(self) -> int:
        """Rows of the head to take at a time: all where it is fp32 already."""
        v, h = self.source.weight.shape
        return max(1, v if self.source.weight.dtype == torch.float32 else min(v, max(1024, TILE_LOGITS // max(1, h))))

    def tiles(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """The head (V, H) in fp32, so many of its rows at a time."""
        v = len(self.source.weight)
        for start in range(0, v, columns):
            tile = slice(start, min(v, start + columns))
            yield tile, self.source.weight[tile].float()

    def logits(self, inputs: Tensor, out: Tensor) -> Tensor:
        """The product alone, without bias, softcap and temperature, in the first rows of `out`."""
        out = out[: len(inputs)]
        for tile, weight in self.tiles(self.columns):
            torch.mm(inputs, weight.T, out=out[:, tile])
        return out


def _product(inputs: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """inputs · weightᵀ (n, columns), in the memory of `buffer`."""
    shape = len(inputs), len(weight)
    out = buffer[: shape[0] * shape[1]].view(shape)
    return torch.mm(inputs, weight.T, out=out)


class _Block:
    """Some rows: their measures (n,), one tile of the vocabulary after the other, and the way back to the logits."""

    def __init__(
        self, head: _Multiplier, rows: Tensor, targets: Tensor | None, ref: _Multiplier | None, forward_kl: bool
    ) -> None:
        self.head, self.ref, self.rows, self.forward_kl = head, ref, rows, forward_kl
        self.inverse_temperatures = head.inverse_temperatures[rows]
        self.targets = None if targets is None else targets[rows]
        v = len(head.source.weight)
        if self.targets is not None and len(rows) and not 0 <= self.targets.min() <= self.targets.max() < v:
            wrong = self.targets[(self.targets < 0) | (self.targets >= v)][0]
            raise ValueError(f"targets must be in [0, {v}) in every row that counts, got {wrong}")
        fresh = torch.tensor([-math.inf, 0, 0, math.nan, -math.inf, 0, 0], dtype=torch.float64)
        self.states = fresh.repeat(len(rows), 1)  # (n, State of policy_rows.cpp)

    def measure(self, logits: Tensor, ref_logits: Tensor | None, first: int = 0) -> None:
        """Take in the products (n, columns) with the vocabulary items from `first` on."""
        self._call("measure", logits, ref_logits, first, None)

    def measures(self, entropy: bool) -> Measures:
        """What was measured once every item was taken in, as `gradient` needs it too."""
        peak, total, weighted, target, _, ref_total, cross = self.states.unbind(1)
        log_total = total.log()
        logprobs = None if self.targets is None else (target - peak - log_total).float()
        kl = None
        if self.ref is not None and self.forward_kl:
            kl = (cross / total - log_total + ref_total.log()).float()
        elif self.ref is not None:
            kl = (cross / ref_total - ref_total.log() + log_total).float()
        entropies = (log_total - weighted / total).float() if entropy else None
        return Measures(logprobs, entropies, kl, (peak + log_total).float())

    def gradient(self, logits: Tensor, ref_logits: Tensor | None, upstream: Measures) -> None:
        """Σ upstream · d measures / d products (n, V), in place of the products."""
        found = self.measures(entropy=True)
        if upstream.kl is None:  # an infinite KL that is only measured must not reach the gradient
            ref_logits, found = None, found._replace(kl=None)
        nothing = torch.zeros(len(self.rows))

        def given(x: Tensor | None) -> Tensor:
            return nothing if x is None else x

        on_softmax = given(upstream.logsumexp) - given(upstream.logprobs)
        peak, total, _, _, ref_peak, ref_total, _ = self.states.unbind(1)
        measured = peak, total.log(), given(found.entropy), ref_peak, ref_total.log(), given(found.kl)
        slopes = given(upstream.logprobs), on_softmax, given(upstream.entropy), given(upstream.kl)
        self._call("gradient", logits, ref_logits, 0, torch.stack([x.float() for x in (*measured, *slopes)], 1))

    def _call(
        self, function: str, logits: Tensor, ref_logits: Tensor | None, first: int, slopes: Tensor | None
    ) -> None:
        compiled = library()
        assert compiled is not None
        tile = slice(first, first + logits.shape[1])
        bias = None if self.head.bias is None else self.head.bias[tile]
        ref_bias = None if self.ref is None or self.ref.bias is None else self.ref.bias[tile]
        arguments = _Rows(
            n=len(logits),
            v=logits.shape[1],
            first=first,
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            bias=_pointer(bias),
            ref=_pointer(ref_logits),
            ref_stride=0 if ref_logits is None else ref_logits.stride(0),
            ref_bias=_pointer(ref_bias),
            targets=_pointer(self.targets),
            inverse_temperatures=_pointer(self.inverse_temperatures),
            states=_pointer(self.states),
            slopes=_pointer(slopes),
            softcap=self.head.source.softcap or 0.0,
            reverse=not self.forward_kl,
        )
        getattr(compiled, function)(ctypes.byref(arguments), compiled.level, torch.get_num_threads())


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Workspace:
    """The blocks of a pass with gradients: one buffer of logits, and one of the reference's, used again and again."""

    def __init__(
        self,
        head: Head,
        ref: Head | None,
        targets: Tensor | None,
        forward_kl: bool,
        rows: Tensor,
        chunk_rows: int | None,
        wanted: Sequence[bool],
    ) -> None:
        self.head, self.ref = _Multiplier(head), None if ref is None else _Multiplier(ref)
        self.targets, self.forward_kl = targets, forward_kl
        self.parts = rows.split(chunk_rows or max(256, BLOCK_LOGITS // max(1, len(head.weight))))
        shape = max(len(part) for part in self.parts), len(head.weight)
        self.buffer = torch.empty(shape)
        self.ref_buffer = None if ref is None else torch.empty(shape)
        hidden, weight, bias = head.hidden, head.weight, head.bias
        # As in the torch backend: bf16 rows stay bf16, fp16 would lose small gradients before a loss scaler lifts them.
        row_dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
        self.hidden = torch.zeros_like(hidden, dtype=row_dtype) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None

    def blocks(self) -> Iterator[tuple[_Block, Callable[[Measures], None]]]:
        """Each block measured, and what adds its gradient, given d loss / d measures."""
        for rows in self.parts:
            block = _Block(self.head, rows, self.targets, self.ref, self.forward_kl)
            inputs = self.head.inputs(rows)
            logits = self.head.logits(inputs, self.buffer)
            ref_logits = None
            if self.ref is not None and self.ref_buffer is not None:
                ref_logits = self.ref.logits(self.ref.inputs(rows), self.ref_buffer)
            block.measure(logits, ref_logits)

            def add(
                upstream: Measures,
                block: _Block = block,
                inputs: Tensor = inputs,
                logits: Tensor = logits,
                ref_logits: Tensor | None = ref_logits,
            ) -> None:
                block.gradient(logits, ref_logits, upstream)
                self._carry_back(block.rows, inputs, logits)

            yield block, add

    def _carry_back(self, rows: Tensor, inputs: Tensor, grad: Tensor) -> None:
        if self.bias is not None:
            self.bias += grad.sum(0)
        if self.hidden is not None:
            of_inputs = torch.zeros_like(inputs)
            for tile, weight in self.head.tiles(self.head.columns):
                of_inputs.addmm_(grad[:, tile], weight)
            self.hidden[rows] = of_inputs.to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(grad.T, inputs)

    def gradients(self) -> Gradients:
        return self.hidden, self.weight, self.bias


def _in_fp32() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)  # it would round the logits to bf16: 3.4 % of ρ


def _measure_rows(
    head: Head,
    targets: Tensor | None,
    ref: Head | None,
    rows: Tensor,
    entropy: bool,
    forward_kl: bool,
    chunk_rows: int | None,
) -> Measures:
    """The measures of these rows (n,), with one tile of logits at a time."""
    multipliers = [_Multiplier(x) for x in (head, ref) if x is not None]
    policy, reference = multipliers[0], multipliers[1] if ref is not None else None
    height = max(1, min(len(rows), chunk_rows or TILE_ROWS))
    columns = max(1, min(TILE_LOGITS // height, *(m.columns for m in multipliers)))
    buffers = [torch.empty(height * columns) for _ in multipliers]
    blocks = [_Block(policy, part, targets, reference, forward_kl) for part in rows.split(height)]
    for tiles in zip(*(m.tiles(columns) for m in multipliers), strict=True):
        for block in blocks:
            logits = [
                _product(m.inputs(block.rows), weight, buffer)
                for m, (_, weight), buffer in zip(multipliers, tiles, buffers, strict=True)
            ]
            block.measure(logits[0], logits[1] if ref is not None else None, tiles[0][0].start)
    parts = zip(*(block.measures(entropy) for block in blocks), strict=True)
    return Measures(*(None if x[0] is None else torch.cat(x) for x in parts))


# ---- the three ops -------------------------------------------------------------------------------------------------


def measure(
    head: Head, targets: Tensor | None, ref: Head | None, entropy: bool, forward_kl: bool, chunk_rows: int | None
) -> Measures:
    with _in_fp32():
        return _measure_rows(head, targets, ref, torch.arange(len(head.hidden)), entropy, forward_kl, chunk_rows)


def measure_backward(
    head: Head,
    targets: Tensor | None,
    ref: Head | None,
    forward_kl: bool,
    chunk_rows: int | None,
    upstream: Measures,
    wanted: Sequence[bool],
) -> Gradients:
    used = torch.zeros(len(head.hidden), dtype=torch.bool)
    for g in upstream:
        used = used if g is None else used | (g != 0)
    with _in_fp32():
        work = _Workspace(head, ref, targets, forward_kl, used.nonzero().squeeze(1), chunk_rows, wanted)
        for block, add in work.blocks():
            add(Measures(*(None if g is None else g[block.rows] for g in upstream)))
    return work.gradients()


def policy_pass(
    head: Head, ref: Head | None, batch: PolicyRows, chunk_rows: int | None, wanted: Sequence[bool]
) -> PolicyPass:
    """Forward and backward of `batch.loss`. Masked rows take no product, rows that cannot have a gradient only one."""
    logprobs, entropy = torch.zeros_like(batch.weights), torch.zeros_like(batch.weights)
    kl = None if ref is None else torch.zeros_like(batch.weights)

    def write(rows: Tensor, found: Measures) -> Tensor:
        assert found.logprobs is not None
        logprobs[rows] = found.logprobs
        if found.entropy is not None:
            entropy[rows] = found.entropy
        if kl is not None and found.kl is not None:
            kl[rows] = found.kl
        return found.logprobs

    learning = batch.learning() & any(wanted)
    only_measured = (batch.live & ~learning).nonzero().squeeze(1)
    with _in_fp32():
        write(only_measured, _measure_rows(head, batch.targets, ref, only_measured, True, True, chunk_rows))
        work = _Workspace(head, ref, batch.targets, True, learning.nonzero().squeeze(1), chunk_rows, wanted)
        for block, add in work.blocks():
            of_rows = batch.at(block.rows)
            found = write(block.rows, block.measures(entropy=True))
            add(Measures(of_rows.logprob_slopes(found), *of_rows.term_slopes()))
    return PolicyPass(logprobs, entropy, kl, work.gradients())
