"""The rollout store: every rollout of the run, append-only on disk. The reuse rule comes later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fst_fast.files import Appender
from fst_fast.records import Rollout


class RolloutStore:
    """`rollouts/rollouts.jsonl` of a run directory. A resumed run cuts it back to its checkpoint's `offset`."""

    def __init__(self, run_dir: Path, *, offset: int = 0, count: int = 0):
        self._file = Appender(run_dir / "rollouts" / "rollouts.jsonl", offset=offset)
        self.count = count

    @property
    def offset(self) -> int:
        """Bytes written so far, on disk."""
        return self._file.offset

    def add(self, rollouts: Sequence[Rollout], *, step: int) -> None:
        """Append and flush: a crash loses at most the batch being written."""
        lines = []
        for r in rollouts:
            lines.append(json.dumps({"id": self.count, "step": step, **_record(r)}, separators=(",", ":")))
            self.count += 1
        self._file.write("".join(line + "\n" for line in lines))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def _record(r: Rollout) -> dict[str, object]:
    return {
        "prompt_id": r.prompt.id,
        "prompt": r.prompt.text,
        "problem_id": r.problem.id,
        "slice": r.problem.slice,
        "sample": r.sample,
        "purpose": r.purpose,
        "prompt_ids": r.prompt_ids,
        "response_ids": r.response_ids,
        "logprobs": r.logprobs,
        "policy_version": r.policy_version,
        "sampling": asdict(r.sampling),
        "finish_reason": r.finish_reason,
        "engine": r.engine,
        "response": r.response,
        "reward": r.reward,
        "parts": dict(r.verdict.parts),
        "feedback": r.verdict.feedback,
    }
