"""The order in which requests are given to an engine. Simple for now: trie order, siblings adjacent."""

from __future__ import annotations

from collections.abc import Sequence

from fst_fast.rollout.engine import Request


def order(requests: Sequence[Request]) -> list[Request]:
    """Requests by priority and then depth-first along the trie of their prompts (lexicographic order of token ids)."""
    return sorted(requests, key=lambda r: (r.priority, r.prompt_ids, r.id))
