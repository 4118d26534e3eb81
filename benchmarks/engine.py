"""The embedded engine against transformers' own samplers on the default run's workload, in one interleaved run.

    python benchmarks/engine.py [--problems 16] [--prompts 4] [--samples 2] [--repeats 7] [--json FILE]

Same model (glyph-base), same prompts, same sampling; every engine must finish every request. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from measure import DEVICE, interleaved, medians, reason, save, setting

from fst_fast.model import Model, load_model
from fst_fast.records import SamplingParams
from fst_fast.rollout.dispatch import Scheduler
from fst_fast.rollout.engine import Request
from fst_fast.rollout.torch_engine import TorchEngine
from fst_fast.tasks.glyph import GlyphTask, instruction_cases

NEW_TOKENS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16, help="problems a step")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of the population")
    parser.add_argument("--samples", type=int, default=2, help="samples per prompt and problem")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds; medians are reported")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, task = load_model(""), GlyphTask("A", 0)
    texts = [text for text, _ in instruction_cases(args.prompts, 1)]
    contexts = [model.encode_chat(task.messages(p, x)) for x in task.train[: args.problems] for p in texts]
    contexts = [c for c in contexts for _ in range(args.samples)]

    engines: dict[str, Callable[[int], int]] = {
        "fst_fast TorchEngine": lambda seed: ours(model, contexts, seed),
        "transformers generate": lambda seed: generate(model, contexts, seed),
        "transformers generate_batch": lambda seed: generate_batch(model, contexts, seed),
    }
    tokens: dict[str, int] = {}
    rounds = dict.fromkeys(engines, 0)

    def call(name: str) -> None:  # another seed every time
        tokens[name] = engines[name](rounds[name])
        rounds[name] += 1

    for name in list(engines):
        try:
            call(name)
        except Exception as error:  # any: it is printed, and the others go on
            print(f"{name:30} not run: {reason(error)}")
            del engines[name]
    seconds = interleaved({name: lambda name=name: call(name) for name in engines}, args.repeats)["seconds"]
    middle = medians(seconds)
    mine = middle["fst_fast TorchEngine"]
    header = f"{len(contexts)} rollouts, {sum(map(len, contexts))} prompt tokens, {DEVICE}, {args.threads} thread(s)"
    print(f"{header}; {setting()}\n{'engine':30} {'median s':>9} {'tokens/s':>9} {'vs ours':>8}")
    for name, value in middle.items():
        print(f"{name:30} {value:9.3f} {tokens[name] / value:9.0f} {value / mine:7.2f}x")
    if args.json:
        save(args.json, title=header, **setting(), seconds=seconds, tokens=tokens)


def ours(model: Model, contexts: list[tuple[int, ...]], seed: int) -> int:
    engine = Scheduler([TorchEngine(model, max_batch=256)])
    sampling = SamplingParams(1.0, NEW_TOKENS)
    engine.submit([Request(i, c, sampling, seed * 10_000 + i) for i, c in enumerate(contexts)])
    done = []
    while engine.busy:
        done += engine.step()
    assert len(done) == len(contexts)
    return sum(len(c.response_ids) for c in done)


def generate(model: Model, contexts: list[tuple[int, ...]], seed: int) -> int:
    """One padded batch; log-probs from its scores, as a trainer needs them."""
    torch.manual_seed(seed)
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in contexts], device=model.device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=model.device)
    out = model.lm.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    model.lm.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
    return int((out.sequences[:, width:] != 0).sum())


def generate_batch(model: Model, contexts: list[tuple[int, ...]], seed: int) -> int:
    """Continuous batching with paged KV and prefix sharing."""
    torch.manual_seed(seed)
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        eos_token_id=sorted(model.eos_ids),
    )  # fmt: skip
    names = transformers.ContinuousBatchingConfig.__dataclass_fields__
    page = "page_size" if "page_size" in names else "block_size"  # its name before transformers 5.2x
    batching = transformers.ContinuousBatchingConfig(
        **{page: 32}, num_blocks=512, max_batch_tokens=2048, return_logprobs=True
    )
    out = model.lm.generate_batch(
        [list(c) for c in contexts], generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    assert len(out) == len(contexts)
    return sum(len(o.generated_tokens) for o in out.values())


if __name__ == "__main__":
    main()
