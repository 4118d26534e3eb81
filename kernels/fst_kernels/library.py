"""Where an extension of csrc/ lies: a plain shared library for ctypes, there if the install could build it."""

import ctypes
import importlib.util


def path_of(extension: str, size_function: str, rows: type[ctypes.Structure]) -> str | None:
    """The library's path; None where it was not built, or from other code than this Python, whose struct it would
    misread: `size_function` gives the size of its own."""
    spec = importlib.util.find_spec(f"{__package__}.{extension}")
    if spec is None or spec.origin is None:
        return None
    size = getattr(ctypes.CDLL(spec.origin), size_function, None)
    return spec.origin if size is not None and size() == ctypes.sizeof(rows) else None
