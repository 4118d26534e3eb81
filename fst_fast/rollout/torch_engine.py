"""The embedded engine: continuous batching on a transformers model in process, the trainer's own weights in place.

Prompts waiting for a place are prefilled as a token trie, level by level: every shared prefix is computed once and its
KV handed to the children. Decoding advances all running sequences by one token. KV never outlives a weight change:
the engine refuses to step when the parameters it is serving were modified behind its back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from fst_fast.model import Head, Model
from fst_fast.prefix_tree import build
from fst_fast.records import FinishReason
from fst_fast.rollout.engine import Completion, EngineStats, Request, check_lengths

MIN_SAVING = 16  # tokens a trie level must save per shared stretch: each level costs one forward pass


@dataclass(slots=True)
class Running:
    """One sequence being decoded: a row of the KV block."""

    request: Request
    uniforms: np.ndarray  # [max_new_tokens], its own random draws
    ids: list[int]
    logprobs: list[float]


class TorchEngine:
    """RolloutEngine on a transformers causal LM with full and sliding-window attention.

    `replica`: where the weights are copied to, if the models that it serves are sharded over ranks.
    """

    name, version = "torch", f"{torch.__version__}"
    cache_tokens = None

    def __init__(self, model: Model, *, max_batch: int = 256, replica: Model | None = None):
        self.stats = EngineStats()
        self.max_batch, self._replica = max_batch, replica
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []
        self.load_weights(model, 0)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def load_weights(self, model: Model, version: int) -> None:
        if self.busy:
            raise RuntimeError("load_weights on a busy engine: drain or abort its requests first")
        if self._replica is not None:
            model = _copied(model, self._replica)
        self.model, self.policy_version = model, version
        self._kv: KVBlock | None = None
        self._last: torch.Tensor | None = None  # [rows, H] hidden state each row samples its next token from
        self._fingerprint = self._weights_fingerprint()
        head = model.head
        self._head = Head(head.weight.detach().float(), None if head.bias is None else head.bias.detach(), head.softcap)

    def sleep(self) -> None:
        """Its weights are the trainer's own, or a copy that stays; KV lives as long as its request."""

    def submit(self, requests: Sequence[Request]) -> None:
        check_lengths(requests, self.model.context)
        # stable: keeps the trie order
        self._waiting = deque(sorted([*self._waiting, *requests], key=lambda r: r.priority))

    def abort(self, ids: Iterable[int]) -> list[Completion]:
        unwanted = set(ids)
        ended = [Completion(r.id, (), (), (), "aborted") for r in self._waiting if r.id in unwanted]
        self._waiting = deque(r for r in self._waiting if r.id not in unwanted)
        return ended + self._retire({i: "aborted" for i, r in enumerate(self._running) if r.request.id in unwanted})

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        if self._weights_fingerprint() != self._fingerprint:
            raise RuntimeError(
                "the weights changed under a running engine: call load_weights with the new version first"
            )
        free = self.max_batch - len(self._running)
        # admitting in quarters of the batch keeps prefills large
        if self._waiting and (not self._running or free >= min(len(self._waiting), max(1, self.max_batch // 4))):
            self._admit([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))])
        if not self._running:
            return []
        finished = self._sample()
        ended = self._retire(finished)
        if self._running:
            self._decode()
        return ended

    def _weights_fingerprint(self) -> int:
        """In-place updates bump a tensor's version counter: a sum over the parameters notices any of them."""
        return sum(p._version for p in self.model.lm.parameters())

    def _admit(self, requests: list[Request]) -> None:
        """Prefill the distinct prompts of `requests` as a trie and give every request a row."""
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}
        kv, last = self._prefill(list(index))
        rows = torch.tensor([index[r.prompt_ids] for r in requests], device=self.model.device)
        kv, last = kv.select(rows), last[rows]
        self._kv = kv if self._kv is None else self._kv.join(kv)
        self._last = last if self._last is None else torch.cat([self._last, last])
        for r in requests:
            uniforms = np.random.Generator(np.random.Philox(key=r.seed)).random(r.sampling.max_new_tokens)
            self._running.append(Running(r, uniforms, [], []))
            self.stats.prompt_tokens += len(r.prompt_ids)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[KVBlock, torch.Tensor]:
        """KV [prompts, ...] and last hidden states [prompts, H], every trie node computed once."""
        nodes = build(prompts, min_saving=MIN_SAVING)
        self.stats.computed_prompt_tokens += sum(node.end - node.start for node in nodes)
        depth: list[int] = []
        for node in nodes:  # parents come first
            depth.append(0 if node.parent < 0 else depth[node.parent] + 1)
        done: KVBlock | None = None
        last: torch.Tensor | None = None
        rows_of: list[int] = []  # prompt index of each row of `done`
        above: KVBlock | None = None
        row_above: dict[int, int] = {}
        for level in range(max(depth) + 1):
            here = [i for i, d in enumerate(depth) if d == level]
            spans = [prompts[nodes[i].sequence][nodes[i].start : nodes[i].end] for i in here]
            parents = torch.tensor([row_above.get(nodes[i].parent, 0) for i in here], device=self.model.device)
            block = KVBlock.empty(len(here)) if above is None else above.select(parents)
            hidden = block.extend(self.model, spans)  # [len(here), H], of each span's last token
            leaves = [(row, prompt) for row, i in enumerate(here) for prompt in nodes[i].leaves]
            if leaves:
                picked = torch.tensor([row for row, _ in leaves], device=self.model.device)
                finished = block.select(picked)
                done = finished if done is None else done.join(finished)
                last = hidden[picked] if last is None else torch.cat([last, hidden[picked]])
                rows_of += [prompt for _, prompt in leaves]
            above, row_above = block, {i: row for row, i in enumerate(here)}
        assert done is not None
        assert last is not None
        back = torch.tensor(np.argsort(rows_of), device=self.model.device)
        return done.select(back), last[back]

    def _sample(self) -> dict[int, FinishReason]:
        """One token for every running sequence; the rows that ended, with the reason."""
        assert self._last is not None
        temperature = torch.tensor([r.request.sampling.temperature for r in self._running], device=self.model.device)
        logprobs = torch.log_softmax(self.model.logits(self._last, self._head) / temperature[:, None], -1)
        # inverse CDF in float64 on the row's own uniform: a request's draws do not depend on its neighbours
        cdf = logprobs.double().exp().cumsum(-1)
        u = torch.tensor([r.uniforms[len(r.ids)] for r in self._running], dtype=torch.float64, device=cdf.device)
        tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).clamp_(max=cdf.shape[1] - 1)
        chosen = logprobs.gather(1, tokens)[:, 0].tolist()
        ended: dict[int, FinishReason] = {}
        for i, (run, token, logprob) in enumerate(zip(self._running, tokens[:, 0].tolist(), chosen, strict=True)):
            run.ids.append(token)
            run.logprobs.append(logprob)
            if token in self.model.eos_ids:
                ended[i] = "stop"
            elif len(run.ids) == run.request.sampling.max_new_tokens:
                ended[i] = "length"
        self.stats.generated_tokens += len(self._running)
        return ended

    def _retire(self, ended: dict[int, FinishReason]) -> list[Completion]:
        out = [
            Completion(
                run.request.id,
                tuple(run.ids),
                tuple(run.logprobs),
                ((self.policy_version, len(run.ids)),),
                ended[i],
            )
            for i, run in enumerate(self._running)
            if i in ended
        ]
        if ended:
            keep = [i for i in range(len(self._running)) if i not in ended]
            self._running = [self._running[i] for i in keep]
            if keep:
                assert self._kv is not None
                assert self._last is not None
                rows = torch.tensor(keep, device=self.model.device)
                self._kv, self._last = self._kv.select(rows), self._last[rows]
            else:
                self._kv = self._last = None
        return out

    def _decode(self) -> None:
        assert self._kv is not None
        self._last = self._kv.extend(self.model, [(r.ids[-1],) for r in self._running])


@torch.no_grad()
def _copied(model: Model, replica: Model) -> Model:
    """`replica` with the weights of `model`; no second copy of them exists on the way."""
    for (_, new), p in zip(model.weights(), replica.lm.parameters(), strict=True):
        p.copy_(new)
    return replica


class KVBlock:
    """Keys and values of a batch of rows in common columns. `valid` [rows, columns] says which columns hold a row's own
    tokens: rows of different lengths leave holes, and the attention mask skips them."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], valid: torch.Tensor):
        self.layers, self.valid = layers, valid  # per layer keys, values [rows, kv heads, capacity, head dim]

    @staticmethod
    def empty(rows: int) -> KVBlock:
        return KVBlock([], torch.zeros(rows, 0, dtype=torch.bool))

    @property
    def columns(self) -> int:
        return self.valid.shape[1]

    def extend(self, model: Model, spans: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run one span of tokens per row (left-padded to the longest); hidden state [rows, H] of each last token."""
        device, width = model.device, max(map(len, spans))
        ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in spans], device=device)
        fresh = torch.tensor([[False] * (width - len(s)) + [True] * len(s) for s in spans], device=device)
        valid = torch.cat([self.valid.to(device), fresh], 1)
        positions = (valid.cumsum(1) - 1).clamp_(min=0)  # [rows, columns]
        queries = positions[:, -width:]
        mask = valid[:, None, :] & (positions[:, None, :] <= queries[:, :, None])  # [rows, width, columns]
        columns = torch.arange(valid.shape[1], device=device)
        mask |= columns[None, None, :] == columns[None, -width:, None]  # padding sees itself: no empty softmax
        masks: Any = additive(mask, model)
        if model.window is not None:
            near = queries[:, :, None] - positions[:, None, :] < model.window
            near |= columns[None, None, :] == columns[None, -width:, None]
            sliding = additive(mask & near, model)
            masks = sliding if model.one_window else {"full_attention": masks, "sliding_attention": sliding}
        cache = InPlaceCache(self.layers, self.columns)
        hidden = model.hidden(ids, attention_mask=masks, position_ids=queries, cache=cache)
        self.layers, self.valid = cache.tensors(), valid
        return hidden[:, -1]

    def select(self, rows: torch.Tensor) -> KVBlock:
        """A block of copies of these rows, without the columns none of them uses."""
        valid = self.valid[rows]
        used = valid.any(0).nonzero()[:, 0]
        if len(used) < 0.75 * self.columns:
            layers = [(k[rows][:, :, used], v[rows][:, :, used]) for k, v in self.layers]
            return KVBlock(layers, valid[:, used])
        return KVBlock([(k[rows], v[rows]) for k, v in self.layers], valid)

    def join(self, other: KVBlock) -> KVBlock:
        """Both blocks' rows in one, right-aligned."""
        columns = max(self.columns, other.columns)
        a, b = self._widened(columns), other._widened(columns)
        layers = [
            (torch.cat([ka, kb]), torch.cat([va, vb])) for (ka, va), (kb, vb) in zip(a.layers, b.layers, strict=True)
        ]
        return KVBlock(layers, torch.cat([a.valid, b.valid]))

    def _widened(self, columns: int) -> KVBlock:
        pad = columns - self.columns
        trim = [(k[:, :, : self.columns], v[:, :, : self.columns]) for k, v in self.layers]
        layers = [tuple(torch.nn.functional.pad(t, (0, 0, pad, 0)) for t in pair) for pair in trim]
        return KVBlock(layers, torch.nn.functional.pad(self.valid, (pad, 0)))  # type: ignore[arg-type]


def additive(mask: torch.Tensor, model: Model) -> torch.Tensor:
    """Boolean mask [rows, queries, columns] → additive mask [rows, 1, queries, columns] as transformers takes it."""
    low = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, low)[:, None]


class InPlaceCache(Cache):
    """transformers' Cache over tensors with spare capacity: a decoded token is written, not concatenated."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], columns: int):
        self._given, self._columns = layers, columns
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx == len(self.layers):
            given = self._given[layer_idx] if self._given else (None, None)
            self.layers.append(InPlaceLayer(*given, columns=self._columns))
        return self.layers[layer_idx].update(key_states, value_states)

    def tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(layer.keys, layer.values) for layer in self.layers]


class InPlaceLayer(CacheLayerMixin):
    """One layer: writes new columns into its tensors, which grow by half when they are full."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None, *, columns: int):
        super().__init__()
        self.keys, self.values, self._columns = keys, values, columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._columns + key_states.shape[2]
        self.keys, self.values = self._write(self.keys, key_states, end), self._write(self.values, value_states, end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write(self, store: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        if store is None or store.shape[2] < end:
            grown = new.new_zeros(new.shape[0], new.shape[1], max(end, end * 3 // 2), new.shape[3])
            if store is not None:
                grown[:, :, : self._columns] = store[:, :, : self._columns]
            store = grown
        store[:, :, self._columns : end] = new
        return store

    def get_seq_length(self) -> int:
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns + query_length, 0

    def get_max_length(self) -> int:
        return -1
