"""vLLM as rollout engine, in this process, one engine a GPU: the only file that touches vllm.

Its API moves: written against 0.25.1 (CUDA, torch 2.11) and 0.32.0 (torch 2.13), tested with the CPU build of 0.32.0,
by hand with that of 0.25.1; 0.25.1 has sampled a run on an H100, before its steps overlapped. What differs between the
two is said where it matters.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fst_fast.errors import UserError
from fst_fast.model import Model
from fst_fast.ranks import launched
from fst_fast.records import FinishReason
from fst_fast.rollout.engine import Completion, EngineStats, Request, check_lengths

CPU_BLOCK = 32  # tokens; on the CPU a block must be a multiple of 32, on a GPU vLLM chooses (16)


@dataclass(slots=True)
class Partial:
    """What a request has so far."""

    id: int
    name: str  # vLLM's
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class VllmEngine:
    """RolloutEngine on vLLM. `model` says what to serve; its weights come with `load_weights`, the first time as ever
    after, and nothing is sampled before.

    `gpu_memory` is the fraction of the GPU that vLLM takes; on the CPU it takes `kv_bytes` of KV cache. Raises
    UserError for a model that vLLM cannot serve. One engine a process: vLLM's process groups are global, and the end of
    any engine takes them from the others. `context`: tokens of its longest sequence.
    """

    name = "vllm"
    policy_version = -1

    def __init__(self, model: Model, *, max_batch: int = 256, gpu_memory: float = 0.5, kv_bytes: int = 1 << 30):
        # of a launched process the GPU that LOCAL_RANK names: 0 under launch.py, while torchrun's ranks see them all
        own = int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0
        if model.device.type == "cuda" and (model.device.index or 0) != own:
            raise UserError(
                f"model.device = {str(model.device)!r}: vllm uses the first GPU it sees; choose one with "
                "CUDA_VISIBLE_DEVICES and leave model.device at auto"
            )
        on_cpu = model.device.type == "cpu"
        _set_environment(on_cpu)
        import vllm  # 10 s
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        place: dict[str, Any]
        if on_cpu:
            place = {"enforce_eager": True, "block_size": CPU_BLOCK, "kv_cache_memory_bytes": kv_bytes}
        else:
            place = {"gpu_memory_utilization": gpu_memory, "enable_sleep_mode": True}
        if launched():  # an engine a rank, among process groups that exist already
            place["distributed_executor_backend"] = "external_launcher"
        try:
            self._llm: Any = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model.path,
                    load_format="dummy",
                    dtype=str(model.dtype).removeprefix("torch."),
                    max_model_len=-1,  # the model's, or what there is KV cache for: vLLM refuses to promise more
                    max_num_seqs=max_batch,
                    skip_tokenizer_init=True,  # token ids in, token ids out
                    generation_config="vllm",  # no sampling defaults out of the model's folder
                    logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
                    # as the trainer's: in bf16 a logit of 16 is up to .06 off (0.25.1 has no such head)
                    hf_overrides={"head_dtype": "float32"},
                    enable_prefix_caching=True,
                    scheduling_policy="priority",
                    async_scheduling=True,  # the host works on a step while the GPU runs another; a CPU has it not
                    disable_log_stats=True,
                    seed=0,
                    **place,
                ),
                usage_context=UsageContext.LLM_CLASS,  # its defaults are for throughput
            )
        except Exception as error:  # of whatever kind: architectures, memory and settings are refused in many ways
            raise UserError(
                f"rollout.engine: vllm cannot serve {model.path}: {' '.join(str(error).split()):.500}"
            ) from error
        self.version: str = vllm.__version__
        # tokens; of a shared prefix only whole blocks are shared
        cache = self._llm.vllm_config.cache_config
        self.block_size: int = cache.block_size
        self.cache_tokens: int = cache.num_gpu_blocks * cache.block_size  # blocks of the CPU are called so too
        # one block is vLLM's own; 0.25.1 promises it, too, and never starts a request that needs it
        room = self.cache_tokens - self.block_size
        self.context: int = min(model.context, self._llm.vllm_config.model_config.max_model_len, room)
        self.stats = EngineStats()
        self._stop = sorted(model.eos_ids)
        self._state: Literal["without weights", "ready", "asleep"] = "without weights"
        self._live: dict[int, Partial] = {}
        self._named: dict[str, Partial] = {}  # the same, by vLLM's names
        self._arrivals = itertools.count()  # equal priorities go in the order of submission
        self._loads = 0

    @property
    def busy(self) -> bool:
        return bool(self._live)

    def submit(self, requests: Sequence[Request]) -> None:
        from vllm.inputs import tokens_input

        if self._state != "ready":
            raise RuntimeError(f"submit to an engine that is {self._state}: load_weights comes first")
        check_lengths(requests, self.context)
        # No KV of older weights is ever read: the cache is emptied with every load, and the salt is another besides.
        salt = str(self._loads)
        for r in requests:
            name = self._llm.add_request(
                str(r.id),
                tokens_input(list(r.prompt_ids), cache_salt=salt),
                self._sampling_params(r),
                arrival_time=float(next(self._arrivals)),
                priority=r.priority,
            )
            self._live[r.id] = self._named[name] = Partial(r.id, name, len(r.prompt_ids))

    def step(self) -> list[Completion]:
        """Reads the engine core's output, for 2 µs a token: with the objects that LLMEngine.step makes of it it was 22,
        while the scheduler takes 25 (0.32's CPU build, 256 sequences)."""
        ended: dict[int, FinishReason] = {}
        for new in self._llm.engine_core.get_output().outputs:
            so_far = self._named[new.request_id]
            if new.finish_reason is not None:
                reason: Any = str(new.finish_reason)
                if reason not in ("stop", "length"):
                    raise RuntimeError(f"vllm gave up request {so_far.id}: {reason}")
                ended[so_far.id] = reason
            if not so_far.ids:  # counted once: what a request computes again after a pre-emption is left out
                self.stats.prompt_tokens += so_far.prompt_tokens
                self.stats.computed_prompt_tokens += so_far.prompt_tokens - new.prefill_stats.num_cached_tokens
            so_far.ids += new.new_token_ids
            so_far.logprobs += new.new_logprobs.logprobs[:, 0].tolist()  # the sampled token's comes first
            self.stats.generated_tokens += len(new.new_token_ids)
        return self._end(ended)

    def abort(self, ids: Iterable[int]) -> list[Completion]:
        return self._end({i: "aborted" for i in ids if i in self._live})

    def load_weights(self, model: Model, version: int) -> None:
        """Asleep or awake. Of a sharded model the weights come bucket by bucket; the KV cache takes its memory after
        them."""
        self._needs_idle("load_weights")
        self._state = "without weights"  # should anything below fail
        if asleep := self._llm.is_sleeping():
            torch.cuda.empty_cache()  # what the trainer has freed is the GPU's again
            self._llm.wake_up(["weights"])
        [missing] = self._llm.apply_model(lambda network: _load(network, model.weights(), self._llm.model_config))
        if missing:
            raise RuntimeError(f"{len(missing)} of vllm's weights are not among the trainer's, e.g. {min(missing)}")
        if asleep:
            torch.cuda.empty_cache()  # of the last bucket
            self._llm.wake_up(["kv_cache"])
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vllm did not empty its prefix cache, which holds KV of older weights")
        self._loads += 1
        self._state, self.policy_version = "ready", version

    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU; on the CPU nothing is given, but weights must come again."""
        self._needs_idle("sleep")
        self._llm.sleep(level=2)  # 1 would keep a copy of weights that are about to change
        self._state = "asleep"

    def _needs_idle(self, what: str) -> None:
        if self.busy:
            raise RuntimeError(f"{what} on a busy engine: drain or abort its requests first")
        # Async scheduling has begun one more step for requests that have ended since: what it samples is of no request,
        # but it runs on the weights and the KV cache. On a CPU there is no queue.
        while self._llm.engine_core.engine_core.batch_queue:
            self._llm.engine_core.get_output()

    def _end(self, reasons: Mapping[int, FinishReason]) -> list[Completion]:
        if reasons:
            self._llm.abort_request([str(i) for i in reasons])  # makes it forget those that finished, too
        return [self._completion(self._live.pop(i), reason) for i, reason in reasons.items()]

    def _completion(self, got: Partial, reason: FinishReason) -> Completion:
        del self._named[got.name]
        versions = ((self.policy_version, len(got.ids)),) if got.ids else ()
        return Completion(got.id, tuple(got.ids), tuple(got.logprobs), versions, reason)

    def _sampling_params(self, r: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=r.sampling.temperature,
            max_tokens=r.sampling.max_new_tokens,
            seed=r.seed,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=self._stop,
            ignore_eos=True,  # `stop_token_ids` has them all
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _set_environment(on_cpu: bool) -> None:
    """What vLLM reads when it is imported, in this process as all else."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the run has a display of its own
    # FlashInfer samples from a top p or k, which no request here has; imported all the same, and built for minutes
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # Unless this says so, 0.32 leaves the process one thread on a GPU (an offloaded optimizer has use for more), and on
    # the CPU takes all cores, where threads beyond the trainer's spin against each other.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    if on_cpu:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        torch._dynamo.config.disable = True  # else a helper of its sampler is compiled, for seconds


@torch.no_grad()
def _load(network: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], config: object) -> set[str]:
    """Put checkpoint weights into vLLM's network; the names of those it has and did not get. A tied head is one tensor
    and comes as the embedding.

    `network.load_weights` alone fails on the CPU, where layers pack their weights after loading; between these two
    calls each layer is unpacked, loaded, packed, and written to the memory it had (which CUDA graphs point to).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(network)
    loaded = network.load_weights(weights)  # type: ignore[operator]
    finalize_layerwise_reload(network, config)
    for layer in network.modules():
        # A tied head got nothing itself: it shares the embedding's weight, but not the copy it packed of the old one.
        # (In 0.25.1 it is the embedding itself.)
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)
    return {name for name, _ in network.named_parameters()} - loaded
