"""One run seed → one independent random stream per purpose and counter, so that nothing random needs saving."""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, *path: str | int) -> int:
    """63-bit seed of the stream named by `path`, e.g. derive(run_seed, "rollout", step).

    Streams are functions of their names alone: drawing from one never moves another, and a resumed run needs no
    saved generator state.
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, *path: str | int) -> random.Random:
    """A `random.Random` of its own for the purpose named by `path`."""
    return random.Random(derive(seed, *path))
