"""The compiled CPU backend: torch's products into a block of fp32 logits, csrc/policy_rows.cpp over its rows in place.

Logits that need no gradient exist one tile (rows × vocabulary items) at a time. First the library, then the row step,
then the pass that is not blocks.py's.
"""

import ctypes
import math

import torch
from torch import Tensor

from .blocks import Ask, Measures, Multiplier, join, slopes_of
from .library import load
from .objective import PolicyRows
from .types import Head, Logits

NOT_BUILT = "fst_kernels._csrc is not built or from older code (install again, with a C++ compiler)"
LEVELS = "baseline", "avx2", "avx512"
TILE_LOGITS = 2**21  # of a forward pass without gradient: 8 MiB
TILE_ROWS = 1024


def refusal(*tensors: Tensor) -> str | None:
    """Why this backend cannot take these tensors; None if it can."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it takes tensors on the CPU, got one on {x.device}"
        if x.dtype == torch.float64:
            return "float64 is the torch backend's"
    return None if LIBRARY is not None else NOT_BUILT


# ---- the library ---------------------------------------------------------------------------------------------------


class _Rows(ctypes.Structure):
    """Rows of csrc/policy_rows.cpp."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("v", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("grad", ctypes.c_void_p),
        ("grad_stride", ctypes.c_int64),
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
    def __init__(self, library: ctypes.CDLL) -> None:
        self.measure, self.gradient = library.fst_rows_measure, library.fst_rows_gradient
        for function in (self.measure, self.gradient):
            function.argtypes = [ctypes.POINTER(_Rows), ctypes.c_int, ctypes.c_int]
            function.restype = None
        self.best_level: int = library.fst_rows_level()
        self.level = self.best_level  # index into LEVELS; tests lower it


# None where the install had no compiler, or is older than this code
LIBRARY = load("_csrc", "fst_rows_bytes", _Rows, _Library)


# ---- the softmax of a block of rows --------------------------------------------------------------------------------


def row_step(logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None, grad: Tensor | None) -> Measures:
    block = _Block(logits, ask)
    block.measure(logits.products, None if ask.ref is None else ask.ref.products)
    found = block.measures()
    if upstream is not None and grad is not None:
        block.gradient(slopes_of(upstream, found), grad)
    return found


class _Block:
    """Some rows: their measures (n,), one tile of the vocabulary after the other, and the way back to the logits."""

    def __init__(self, logits: Logits, ask: Ask) -> None:
        targets = None if ask.targets is None else ask.targets.contiguous()
        self.logits, self.ask = logits, ask._replace(targets=targets)
        n = len(logits.products)
        self.inverse_temperatures = (1 / logits.temperature.double()).float().expand(n).contiguous()
        fresh = torch.tensor([-math.inf, 0, 0, math.nan, -math.inf, 0, 0], dtype=torch.float64, device="cpu")
        self.states = fresh.repeat(n, 1)  # (n, State of policy_rows.cpp)

    def measure(self, products: Tensor, ref_products: Tensor | None, first: int = 0) -> None:
        """Take in the products (n, columns) with the vocabulary items from `first` on."""
        self._call("measure", products, ref_products, first)

    def measures(self) -> Measures:
        """What was measured, once every item was taken in."""
        peak, total, weighted, target, _, ref_total, cross = self.states.unbind(1)
        log_total = total.log()
        logprobs = None if self.ask.targets is None else (target - peak - log_total).float()
        kl = None
        if self.ask.ref is not None and self.ask.forward_kl:
            kl = (cross / total - log_total + ref_total.log()).float()
        elif self.ask.ref is not None:
            kl = (cross / ref_total - ref_total.log() + log_total).float()
        entropy = (log_total - weighted / total).float() if self.ask.entropy else None
        return Measures(logprobs, entropy, kl, (peak + log_total).float())

    def gradient(self, upstream: Measures, grad: Tensor) -> None:
        """Σ upstream · d measures / d products into grad (n, V)."""
        found, nothing = self.measures(), self.states.new_zeros(len(grad), dtype=torch.float32)

        def given(x: Tensor | None) -> Tensor:
            return nothing if x is None else x

        ref, kl = self.ask.ref, found.kl
        if upstream.kl is None:  # an infinite KL that is only measured must not reach the gradient
            ref = kl = None
        on_softmax = given(upstream.logsumexp) - given(upstream.logprobs)
        peak, total, _, _, ref_peak, ref_total, _ = self.states.unbind(1)
        measured = peak, total.log(), given(found.entropy), ref_peak, ref_total.log(), given(kl)
        slopes = given(upstream.logprobs), on_softmax, given(upstream.entropy), given(upstream.kl)
        packed = torch.stack([x.float() for x in (*measured, *slopes)], 1)
        products = self.logits.products
        self._call("gradient", products, None if ref is None else ref.products, 0, packed, grad)

    def _call(
        self,
        function: str,
        products: Tensor,
        ref_products: Tensor | None,
        first: int,
        slopes: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> None:
        assert LIBRARY is not None
        tile = slice(first, first + products.shape[1])
        logits, ref = products.float(), None if ref_products is None else ref_products.float()
        bias = _floats(self.logits.bias, tile)
        ref_bias = None if self.ask.ref is None else _floats(self.ask.ref.bias, tile)
        out = grad if grad is None or grad.dtype == torch.float32 else torch.empty_like(logits)
        arguments = _Rows(
            n=len(logits),
            v=logits.shape[1],
            first=first,
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            grad=_pointer(out),
            grad_stride=0 if out is None else out.stride(0),
            bias=_pointer(bias),
            ref=_pointer(ref),
            ref_stride=0 if ref is None else ref.stride(0),
            ref_bias=_pointer(ref_bias),
            targets=_pointer(self.ask.targets),
            inverse_temperatures=_pointer(self.inverse_temperatures),
            states=_pointer(self.states),
            slopes=_pointer(slopes),
            softcap=self.logits.softcap or 0.0,
            reverse=not self.ask.forward_kl,
        )
        getattr(LIBRARY, function)(ctypes.byref(arguments), LIBRARY.level, torch.get_num_threads())
        if grad is not None and out is not None and out is not grad:
            grad.copy_(out)


def _floats(bias: Tensor | None, tile: slice) -> Tensor | None:
    return None if bias is None else bias[tile].float().contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ---- log-probs and measures: one tile of logits at a time ----------------------------------------------------------


def measure(
    head: Head, targets: Tensor | None, ref: Head | None, entropy: bool, forward_kl: bool, chunk_rows: int | None
) -> Measures:
    heads = [Multiplier(x, head.dtype) for x in (head, ref) if x is not None]
    height = max(1, min(len(head.hidden), chunk_rows or TILE_ROWS))
    columns = max(1, min(TILE_LOGITS // height, *(x.columns for x in heads)))
    buffers = [torch.empty(height * columns, dtype=torch.float32, device="cpu") for _ in heads]
    blocks = []
    for rows in torch.arange(len(head.hidden), device="cpu").split(height):
        own, other = (
            x.shaped(rows, buffers[0].new_empty(len(rows), 0)) for x in (heads[0], heads[-1])
        )  # products come later
        ask = Ask(None if targets is None else targets[rows], entropy, None if ref is None else other, forward_kl)
        blocks.append((rows, _Block(own, ask)))
    for tiles in zip(*(x.tiles(columns) for x in heads), strict=True):
        for rows, block in blocks:
            products = [
                x.product(x.inputs(rows), weight.T, out=buffer[: len(rows) * len(weight)].view(len(rows), len(weight)))
                for x, (_, weight), buffer in zip(heads, tiles, buffers, strict=True)
            ]
            block.measure(products[0], products[1] if ref is not None else None, tiles[0][0].start)
    return join(block.measures() for _, block in blocks)
