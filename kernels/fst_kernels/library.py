"""Opens an extension of csrc/: a plain shared library for ctypes, there if the install could build it."""

import ctypes
import importlib.util
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def load(
    extension: str, size_function: str, rows: type[ctypes.Structure], bind: Callable[[ctypes.CDLL], T]
) -> T | None:
    """`bind` of the library; None where it was not built, or from other code than this Python: it lacks a function, or
    would misread a struct (`size_function` gives the size of its own)."""
    spec = importlib.util.find_spec(f"{__package__}.{extension}")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    try:
        return bind(library) if getattr(library, size_function)() == ctypes.sizeof(rows) else None
    except AttributeError:
        return None
