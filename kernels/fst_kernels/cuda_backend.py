"""The row step on a Hopper GPU: csrc/row_cluster.cu, a cluster of thread blocks a row, one read and one write.

Logits are products of cuBLAS or given; a bf16 gradient lies in the first half of each row of fp32 logits, as in
triton_backend.py. The library is built by an install with FST_CUDA=1.
"""

import ctypes

import torch
from torch import Tensor

from .blocks import Ask, Measures
from .library import load
from .objective import KINDS, PolicyRows
from .row_arguments import row_arguments
from .types import Logits

NOT_BUILT = "fst_kernels._cuda is not built, or from older code: install from source with FST_CUDA=1 and nvcc"
DTYPES = torch.float32, torch.bfloat16  # of logits and their gradient


def refusal(*operands: Tensor) -> str | None:
    """Why this backend cannot take these logits, or this hidden and weight; None if it can."""
    for x in operands:
        if not _is_hopper(x.device):
            return f"it is for Hopper GPUs (compute capability 9.0), got a tensor on {x.device}"
        if x.dtype == torch.float64:
            return "float64 is the torch backend's"
    if len(operands) == 1 and operands[0].dtype not in DTYPES:
        return f"it takes logits in fp32 or bf16, got {operands[0].dtype}"
    return None if LIBRARY is not None else NOT_BUILT


def suits(*operands: Tensor) -> bool:
    """Whether "auto" may choose this backend: it takes the tensors whatever is asked of them. Not in torch.compile,
    which can look at no address of a tensor and call no library."""
    if torch.compiler.is_compiling() or refusal(*operands) is not None or LIBRARY is None:
        return False
    if len(operands) == 1 and not _aligned(operands[0]):
        return False
    v = operands[0].shape[1] if len(operands) == 1 else len(operands[1])
    return bool(v) and LIBRARY.cluster_size(v, 2 * 4) > 0  # a reference's row too, in fp32


# ---- the library ---------------------------------------------------------------------------------------------------


class _Rows(ctypes.Structure):
    """Rows of csrc/row_cluster.cu."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("ref", ctypes.c_void_p),
        ("ref_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("ref_bias", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("grad_stride", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("found", ctypes.c_void_p * 4),
        ("slopes", ctypes.c_void_p * 4),
        ("behavior", ctypes.c_void_p),
        ("advantages", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("v", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("reverse_kl", ctypes.c_int32),
        ("bf16_logits", ctypes.c_int32),
        ("bf16_grad", ctypes.c_int32),
    )


class _Library:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.cluster_size, self._launch = library.fst_cluster_size, library.fst_cluster_rows
        self._error = library.fst_cluster_error
        self.cluster_size.argtypes = [ctypes.c_int, ctypes.c_int]
        self._launch.argtypes = [ctypes.POINTER(_Rows), ctypes.c_int, ctypes.c_void_p]
        self._error.restype = ctypes.c_char_p

    def launch(self, rows: _Rows, cluster: int, stream: int | None) -> None:
        if error := self._launch(ctypes.byref(rows), cluster, stream):
            reason = self._error(error).decode()
            raise RuntimeError(f"the CUDA row kernel did not start (clusters of {cluster} blocks): {reason}")


# None where the install did not ask for it or had no nvcc, or is older than this code
LIBRARY = load("_cuda", "fst_cluster_bytes", _Rows, _Library)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# ---- the row step --------------------------------------------------------------------------------------------------


def row_step(logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None, grad: Tensor | None) -> Measures:
    assert LIBRARY is not None
    products, ref = logits.products, None if ask.ref is None else ask.ref.products
    n, v = products.shape
    cluster = LIBRARY.cluster_size(v, products.element_size() * (1 if ref is None else 2))
    if v and not cluster:
        raise ValueError(f"backend='cuda' has no room for rows of {v} logits: use 'triton'")
    if not logits.ours and not _aligned(products):
        raise ValueError(
            f"backend='cuda' takes logits whose rows are multiples of 16 bytes, got {list(products.shape)}"
            f" {products.dtype}: use 'triton'"
        )
    given = row_arguments(logits, ask, upstream)
    bias, ref_bias = (None if x is None else x.float() for x in (given.bias, given.ref_bias))
    rows = _Rows(
        n=n,
        logits=products.data_ptr(),
        stride=products.stride(0),
        ref=_pointer(ref),
        ref_stride=0 if ref is None else ref.stride(0),
        bias=_pointer(bias),
        ref_bias=_pointer(ref_bias),
        grad=_pointer(grad),
        grad_stride=0 if grad is None else grad.stride(0),
        targets=_pointer(given.targets),
        temperature=_pointer(given.temperature),
        found=tuple(map(_pointer, given.found)),
        slopes=tuple(map(_pointer, given.slopes)),
        behavior=_pointer(given.behavior),
        advantages=_pointer(given.advantages),
        weights=_pointer(given.weights),
        low=given.low,
        high=given.high,
        softcap=logits.softcap or 0.0,
        v=v,
        kind=("given", *KINDS).index(given.kind),
        reverse_kl=not ask.forward_kl,
        bf16_logits=products.dtype == torch.bfloat16,
        bf16_grad=grad is not None and grad.dtype == torch.bfloat16,
    )
    if n and v:
        with torch.cuda.device_of(products):
            LIBRARY.launch(rows, cluster, _stream(products.device))
    return given.found


def _aligned(logits: Tensor) -> bool:
    """The kernel can read these rows, and write a gradient of their dtype whose rows follow one another."""
    size = logits.element_size()
    return not any(x % 16 for x in (logits.data_ptr(), size * logits.stride(0), size * logits.shape[1]))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
