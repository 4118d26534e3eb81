"""The plan of a run: what it says of tokens is what a run then takes, of memory what torch keeps; bad plans refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_fast import calibrate
from fst_fast.checkpoint import _staged
from fst_fast.cli import PlanCommand, TrainCommand, parse_train
from fst_fast.config import GLYPH, Config, SlowConfig, preset
from fst_fast.errors import UserError
from fst_fast.memory import Layout, Part, activations, host_parts, parts, peak
from fst_fast.model import load_model
from fst_fast.plan import PlanOptions, layout_of, speed_of, target_of
from fst_fast.rates import Hardware, Lengths, Rate, Roofline, kind_of, read_table
from fst_fast.shape import PassWork, Shape, read_shape, shape_of
from fst_fast.slow.policy import Policy
from fst_fast.train import main, train
from fst_fast.workload import LIVE, Batch, asked_ahead, phases, scored, work_of
from tests.models import save_tiny

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
BIG = ["--plan", "--plan.model", "qwen3-8b", "--plan.gpu", "h100", "--plan.gpus", "8", "--model.dtype", "bfloat16"]
NOISE = f"jsonl:{Path(__file__).parent / 'data' / 'noise.jsonl'}@9"
FITS = [*BIG, "--slow.recompute", "full", "--stream", "jsonl:none.jsonl@200"]


def planned(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(argv)
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-4b", 4.022), ("qwen3-8b", 8.191)]
)
def test_the_built_in_shapes_have_the_parameters_of_their_models(name: str, billions: float) -> None:
    shape = read_shape(name, field="plan.model")
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert shape.body + shape.head * (1 if shape.tied else 2) == shape.parameters


def test_flops_are_those_of_the_products_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = Qwen3Config(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    lm = Qwen3ForCausalLM(config)
    shape = shape_of(lm, "tiny")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(input_ids=torch.randint(96, (1, 50)))
    triangle = 4 * shape.layers * shape.width * 50 * 49 // 2  # the upper one: eager attention does not skip it
    norms = 2 * 50 * sum(p.numel() for p in lm.parameters() if p.ndim == 1)
    ours = shape.forward_flops(PassWork.over([(0, 50)], 50)) + triangle - norms
    angles = 2 * 50 * 32 // 2  # of RoPE: a matrix product in transformers 5.17, none in 5.24
    assert counter.get_total_flops() in (pytest.approx(ours, rel=1e-6), pytest.approx(ours + angles, rel=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_without_checkpointing_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    def kept(layers: int) -> int:
        config = Qwen3Config(
            vocab_size=64, hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32,
        )  # fmt: skip
        lm = Qwen3ForCausalLM(config).to(dtype)
        own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
        found: dict[int, torch.Tensor] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            found[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lm.base_model(input_ids=torch.randint(64, (2, 40)), use_cache=False)
        return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in own)

    shape = Shape("tiny", 1, 96, 128, 64, 256, 64, 2048, 0, True)
    assert (kept(3) - kept(1)) / 2 == pytest.approx(
        activations(shape, "off", 80, dtype.itemsize, fused=False), rel=0.03
    )


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_keeps_less_the_more_it_recomputes(fused: bool) -> None:
    shape = read_shape("qwen3-8b", field="plan.model")
    off, selective, full = (activations(shape, mode, 8192, 2, fused=fused) for mode in ("off", "selective", "full"))
    assert off > selective > full > shape.layers * 8192 * 2 * shape.hidden


# ---------------------------------------------------------------------------------------------------------- memory


def test_the_worst_moment_is_of_one_time_and_what_is_always_there() -> None:
    some = [Part("a", 10, "always"), Part("b", 5, "learning"), Part("c", 4, "learning"), Part("d", 7, "loading")]
    assert peak(some) == pytest.approx(1.05 * 19)
    assert peak([*some, Part("e", 20, "sampling")]) == pytest.approx(1.05 * 30)


def test_trainer_state_is_so_many_bytes_a_parameter_over_the_ranks_and_less_when_offloaded() -> None:
    config = replace(preset("paper", "fst"), model=replace(Config().model, dtype="bfloat16"))
    shape = read_shape("qwen3-8b", field="plan.model")
    for gpus, offload, expected in ((1, False, 2 + 4 + 8 + 4), (8, False, (4 + 8 + 4) / 8), (8, True, 0)):
        config = replace(config, slow=replace(config.slow, offload=offload))
        options = PlanOptions(gpu="h100", gpus=gpus, model="qwen3-8b")
        of = parts(shape, layout_of(config, options, target_of(config, options)))
        state = [p for p in of if ("weights" in p.name and "engine" not in p.name) or "moments" in p.name]
        state += [p for p in of if p.name.startswith("gradients")]
        assert sum(p.bytes for p in state) == pytest.approx(expected * shape.parameters)


def test_memory_is_what_a_run_on_a_gpu_had_allocated() -> None:
    """benchmarks/results/h100/cost-torch.json: Qwen3-1.7B with Liger's layers, micro-batches of 8192 tokens.

    Gradients were summed in bf16 then, at two bytes a parameter less.
    """
    config = replace(preset("paper", "fst"), model=replace(Config().model, dtype="bfloat16"))
    config = replace(config, slow=replace(config.slow, micro_tokens=8192))
    options = PlanOptions(gpu="h100", model="qwen3-1.7b")
    shape = read_shape("qwen3-1.7b", field="plan.model")
    of = parts(shape, layout_of(config, options, target_of(config, options)))
    allocated = json.loads((RESULTS / "h100/cost-torch.json").read_text())["results"]["fst"]["allocated_gib"]
    by_torch = [p for p in of if p.when in ("always", "learning") and not p.name.startswith("CUDA context")]
    then = sum(p.bytes for p in by_torch) - 2 * shape.parameters
    assert then / 2**30 == pytest.approx(allocated, rel=0.03)


def test_vllms_memory_and_that_of_learning_are_not_needed_at_once() -> None:
    config, options = preset("qwen3-8b-math", "fst"), PlanOptions(gpu="h100", gpus=8, model="qwen3-8b")
    of = parts(read_shape("qwen3-8b", field="plan.model"), layout_of(config, options, target_of(config, options)))
    assert [p.when for p in of if p.name.startswith("vLLM")] == ["sampling"]


def test_a_plan_counts_the_base_model_whatever_the_kl_and_a_whole_model_while_it_is_loaded() -> None:
    config, options = preset("qwen3-8b-math", "fst"), PlanOptions(gpu="h100", gpus=8, model="qwen3-8b")
    shape = read_shape("qwen3-8b", field="plan.model")
    for kl, offload in ((0.0, False), (0.001, False), (0.0, True)):
        config = replace(config, slow=replace(config.slow, kl_coef=kl, offload=offload))
        of = parts(shape, layout_of(config, options, target_of(config, options)))
        (whole,) = (p.bytes for p in of if p.when == "loading")
        base, trained, moments = (
            sum(p.bytes for p in of if p.when == "always" and p.name.startswith(name))
            for name in ("base", "weights that are trained", "AdamW")
        )
        assert base == (0 if offload else 2 * shape.parameters / 8)
        cut = 0 if offload else 2 * shape.parameters / 8  # its first part is a master already
        assert whole + trained + moments == pytest.approx(2 * shape.parameters + cut)


def test_every_machine_has_all_of_the_trainers_state() -> None:
    """Its GPUs share it among them, and not with those of another machine (ranks.joined's mesh)."""
    config = replace(preset("qwen3-8b-math", "fst"), rollout=replace(Config().rollout, engine="vllm", problems=256))
    shape = read_shape("qwen3-8b", field="plan.model")

    def state(gpus: int, node: int) -> tuple[float, Layout]:
        options = PlanOptions(gpu="h100", gpus=gpus, node=node, model="qwen3-8b")
        at = layout_of(config, options, target_of(config, options))
        return sum(p.bytes for p in parts(shape, at) if p.when == "always"), at

    (eight, at_eight), (sixteen, at_sixteen), (one_machine, _) = state(8, 8), state(16, 8), state(16, 16)
    assert eight == sixteen > one_machine
    assert host_parts(shape, at_eight) == host_parts(shape, at_sixteen)
    loading, *saving = host_parts(shape, at_eight)
    assert loading.bytes == 8 * 2 * shape.parameters
    assert sum(p.bytes for p in saving) == 14 * shape.parameters
    (offloaded,) = (p for p in host_parts(shape, replace(at_eight, offload=True)) if p.when == "always")
    assert offloaded.bytes == 18 * shape.parameters


def test_what_is_copied_for_a_checkpoint_is_twelve_bytes_a_parameter(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    policy = Policy(load_model(str(tmp_path), dtype="bfloat16"), SlowConfig())
    copied = [x for x in tree_leaves(_staged(policy.state_dict())) if isinstance(x, torch.Tensor)]
    parameters = sum(p.numel() for p in policy.model.lm.parameters())
    assert sum(x.nbytes for x in copied) == pytest.approx(12 * parameters, rel=1e-3)


def test_qwen3_8b_on_eight_gpus_is_given_a_configuration_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    argv = BIG[:-2]
    for _ in range(3):  # what it names is what it then accepts
        try:
            shown = planned(argv, capsys)
            break
        except UserError as error:
            said = str(error)
            assert "qwen3-8b on 8 GPUs of 79 GiB needs" in said
            argv += said.split("; ")[1].removesuffix(" fits").split()
    assert "--slow.recompute" in argv
    assert "fits in 79.2" in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--plan.gpus", "1"], "--plan.gpus"),
        (["--plan.gpus", "0"], "plan.gpus = 0: must be greater than or equal to 1"),
        (["--plan.node", "0"], "plan.node = 0: must be"),
        (["--ranks", "4"], "ranks = 4: a plan is of --plan.gpus, a process each"),
        (["--plan.gpus", "12"], "plan.gpus = 12: machines of plan.node = 8 have as many processes each; use a mult"),
        (["--plan.live", "nan"], "plan.live = nan: must be"),
        (["--plan.live", "-1"], "plan.live = -1.0: must be"),
        (["--plan.prompt-tokens", "-1000"], "plan.prompt_tokens = -1000: must be"),
        (["--rollout.engine", "vllm", "--rollout.gpu-memory", "0.1"], "rollout.gpu_memory = 0.1"),
        (["--rollout.max-new-tokens", "50000"], "rollout.max_new_tokens = 50000: with 600 tokens of prompt"),
        (["--plan.gpu", "tpu"], "plan.gpu = 'tpu': rates are known of h100, h200, a100, cpu"),
        (["--plan.model", "gpt-9"], "plan.model = 'gpt-9': there is no gpt-9/config.json"),
        (["--slow.lora-rank", "8"], "slow.lora_rank: a plan knows the training of all weights alone"),
        (["--rollout.group-size", "6"], "rollout.group_size = 6 cannot be spread evenly"),
        (
            ["--stream", NOISE, "--jsonl.verifier", "foo"],
            "jsonl.verifier: 'foo' is not known",
        ),
        (["--stream", NOISE], "rollout.problems = 32 is more than the 23 training problems"),
        (["--stream", NOISE, "--reflector", "phrasebook", "--rollout.problems", "8"], "has no phrase book; choose"),
        (["--stream", "glyph:A+hover:nowhere@9,runes:A@9"], "task 'runes:A': there is no such task"),
        (
            ["--stream", "star_graph:4x3@9,glyph:A@9", "--reflector", "phrasebook", "--rollout.problems", "9999"],
            "9999 is",
        ),
        (["--eval.ood", "runes:B"], "task 'runes:B': there is no such task"),
        (
            ["--reflector", "policy", "--reflector.max-new-tokens", "99999"],
            "reflector.max_new_tokens = 99999: an edit by",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_that_names_the_field(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        main([*FITS, *flags])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_large_model_is_told_of_the_share_in_which_vllm_holds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process has all of its weights: 61 of 79 GiB."""
    shape = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "qwen3", "tie_word_embeddings": False}))
    argv = [*FITS, "--plan.model", str(tmp_path), "--rollout.engine", "vllm"]
    with pytest.raises(UserError) as error:
        main(argv)
    _, _, flags = str(error.value).removesuffix(" fits").rpartition("; ")
    assert flags == "--slow.offload True --rollout.gpu-memory 0.85"
    assert "fits in" in planned([*argv, *flags.split()], capsys)


def test_the_embedded_model_is_no_reflector_of_its_own_prompts_in_a_plan_either() -> None:
    with pytest.raises(UserError, match=r"reflector.max_new_tokens = 2048: an edit by the policy .* 512 tokens"):
        main(["--plan", "--reflector", "policy"])


def test_what_does_not_fit_this_machine_is_not_said_of_gpus() -> None:
    with pytest.raises(UserError) as error:
        main(["--plan", "--plan.model", "qwen3-8b", "--plan.gpu", "cpu"])
    assert "GPUs of" not in str(error.value)
    assert "this machine's CPU" in str(error.value)
    assert "--plan.gpu h100 --plan.gpus 8" in str(error.value)


def test_a_small_model_is_not_compared_with_the_papers_and_only_cheaper_ways_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--plan", "--preset", "qwen3-8b-math", "--plan.response-tokens", "2000"]
    small = planned([*argv, "--plan.model", "qwen3-1.7b", "--plan.gpu", "h100"], capsys)
    assert "the paper" not in small
    assert "GPU-hours: 1 GPU x" in small
    for gpus in ("8", "16"):
        lines = planned([*argv, "--plan.gpus", gpus], capsys).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("GPU-hours"))
        hours = float(lines[start].split(" = ")[1].split(";")[0])
        others = [float(line.rsplit(": ")[1]) for line in lines[start + 1 :] if line.startswith("  with --")]
        assert others
        assert max(others) < hours


def test_a_plan_with_a_run_to_resume_or_a_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume takes a run directory and no other flag"):
        main(["--plan", "--resume", str(tmp_path)])
    with pytest.raises(UserError, match=r"model.path = .*there is no"):
        main(["--plan", "--model.path", str(tmp_path)])
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(UserError, match=r"its config.json is not one of a causal LM"):
        main(["--plan", "--model.path", str(tmp_path)])


# ------------------------------------------------------------------------------------------------ tokens and time


def test_planned_tokens_and_rollouts_are_within_a_fifth_of_a_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "LARGE", 96)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)  # seconds are not looked at
    config = replace(
        GLYPH, stream="glyph:A@10", eval=replace(GLYPH.eval, problems=16), tensorboard=False, progress=False
    )
    options = PlanOptions(gpu="cpu")
    target = target_of(config, options)
    speed = speed_of(config, options, target)
    work = work_of(config, LIVE)
    train(config, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    totals = [r for r in metrics if r["kind"] == "eval"][-1]
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "rollouts.jsonl").open()]
    learning = work.rollouts("rollout", "scoring", "minibatch")
    assert learning == pytest.approx(totals["rollouts"], rel=0.1)
    assert learning * speed.lengths.response == pytest.approx(totals["tokens"], rel=0.2)
    assert work.rollouts("scoring", "minibatch") == pytest.approx(totals["gepa_rollouts"], rel=0.2)
    assert work.rollouts("eval") == pytest.approx(sum(r["purpose"] == "eval" for r in rollouts), rel=0.01)
    assert work.reused == sum(round(r["reuse"]["fraction"] * 128) for r in metrics if r["kind"] == "step")
    said = phases(work, speed, config)  # every phase that took time in the run is planned
    assert {"rollout", "scoring", "minibatch", "eval", "gate", "learn", "sync", "checkpoint"} == set(said)


@pytest.mark.parametrize("mode", ["rl", "gepa", "rl-then-gepa", "fst-distill"])
def test_every_mode_is_planned_as_the_loop_goes(mode: str) -> None:
    config = replace(preset("glyph", mode), stream="glyph:A@25,glyph:B@10")  # type: ignore[arg-type]
    work = work_of(config, 1.0)
    assert work.steps == 35
    assert work.evaluations == (3 + 1) + (1 + 1)
    assert work.cycles == {"rl": 0, "gepa": 3 + 1, "rl-then-gepa": 1, "fst-distill": 3 + 1}[mode]
    assert work.rollouts("rollout") == (0 if mode == "gepa" else 35 * 128)
    assert work.reused == 0
    assert (work.rollouts("scoring") > 0) == (mode != "rl")
    steps = [b for b in work.batches if b.phase == "rollout"]
    assert steps == ([] if mode == "gepa" else [Batch("rollout", 128, 25), Batch("rollout", 128, 10)])


def test_cycles_that_fill_the_steps_cost_them_what_their_rollouts_do_and_no_waiting() -> None:
    waited, filler = (
        work_of(replace(GLYPH, stream="glyph:A@30", fast=replace(GLYPH.fast, race=False, filler=on)), live=0.5)
        for on in (False, True)
    )
    assert waited.rollouts("scoring") == filler.rollouts("scoring") > 0
    assert not any(b.beside for b in waited.batches)
    calls = 1 + 3  # the pool's, then of one round the parents', the children's, the accepted ones'
    assert [b.beside for b in filler.batches if b.phase in ("scoring", "minibatch")][-2 * calls :] == [True] * 2 * calls

    one, other = (phases(work, roofline(), GLYPH) for work in (waited, filler))
    assert sum(other.values()) < sum(one.values())
    assert (
        0 < other["scoring"] + other["minibatch"] < one["scoring"] + one["minibatch"]
    )  # the first cycle is waited for
    assert other["rollout"] > one["rollout"]


def test_steps_asked_ahead_are_those_between_pauses_and_two_at_once_are_faster_than_one_after_the_other() -> None:
    every = {"eval": replace(GLYPH.eval, every=4), "checkpoint_every": 6, "stream": "glyph:A@12"}
    waited, ahead = (
        replace(preset("glyph", "rl"), **every, rollout=replace(GLYPH.rollout, lookahead=n))  # type: ignore[arg-type]
        for n in (0, 1)
    )
    works = [work_of(config, 1.0) for config in (waited, ahead)]
    assert [w.asked_ahead for w in works] == [0, 8]  # not 0, 4, 6, 8
    assert asked_ahead(replace(ahead, mode="fst", fast=replace(GLYPH.fast, every=3)), 12) == 6  # nor 3, 9
    speed = roofline()
    times = [phases(work, speed, config)["rollout"] for work, config in zip(works, (waited, ahead), strict=True)]
    assert times == [12 * speed.rollouts(128), 4 * speed.rollouts(128) + 8 * speed.rollouts(256) / 2]


def test_streaming_time_is_near_the_simulators_for_its_own_workload() -> None:
    """The same 64 x 8 rollouts, each step's behind those of the step before: 47.4 s a step (benchmarks/README.md)."""
    assert roofline().rollouts(1024) / 2 == pytest.approx(47.4, rel=0.1)


def test_an_endpoint_that_edits_beside_a_step_is_waited_for_as_long_as_it_takes_longer() -> None:
    fast = replace(GLYPH.fast, reflector="openai", race=False, filler=True)
    config = replace(GLYPH, stream="glyph:A@30", fast=fast, reflector=replace(GLYPH.reflector, concurrency=1))
    work, speed = work_of(config, 0.5), roofline()
    assert (work.cycles, work.rounds_beside) == (3, 2)
    spent = phases(work, speed, config)
    step = (spent["rollout"] + spent["learn"] + spent["sync"]) / 30
    rounds = work.proposals / work.rounds * speed.hardware["reflect_seconds"]
    assert 0 < step < rounds
    assert spent["reflect"] == pytest.approx((work.rounds - 2) * rounds + 2 * (rounds - step))
    waited = work_of(replace(config, fast=replace(fast, filler=False)), 0.5)
    assert phases(waited, speed, config)["reflect"] == pytest.approx(work.rounds * rounds)


def test_edits_of_the_policy_take_the_iterations_of_their_tokens() -> None:
    config = replace(GLYPH, stream="glyph:A@30", fast=replace(GLYPH.fast, reflector="policy"))
    config = replace(config, reflector=replace(config.reflector, max_new_tokens=2048))
    work, speed = work_of(config, 0.5), roofline()  # whose longest response has 8192
    each = speed.rollouts(work.proposals / work.rounds)
    assert phases(work, speed, config)["reflect"] == pytest.approx(work.rounds * each / 4)


def test_vllms_host_is_waited_for_where_it_is_slower_than_the_gpu() -> None:
    fast = roofline()
    slow = replace(fast, hardware=Hardware("h100", {**fast.hardware.rates, "iteration_us": Rate(20e3, "a test")}))
    host = 8192 * 0.02 + 1 * 2000 * 10e-6  # 8 rollouts on 8 GPUs
    assert slow.rollouts(8) == pytest.approx(host, rel=0.01)
    assert fast.rollouts(8) < host / 2


def test_a_race_costs_less_than_scoring_everybody_to_the_end() -> None:
    everybody = replace(GLYPH, fast=replace(GLYPH.fast, race=False))
    assert scored((10,), 24, everybody) == 240
    assert 24 * 4 < scored((10,), 24, GLYPH) < 240
    assert scored((10_000,), 24, GLYPH) == pytest.approx(10_000 / 250 * scored((250,), 24, GLYPH), rel=0.1)
    assert scored((10,), 24 * 10**6, GLYPH) == pytest.approx(10**6 * scored((10,), 24, GLYPH), rel=0.2)


def roofline(**changes: object) -> Roofline:
    shape = read_shape("qwen3-8b", field="plan.model")
    options = {
        "gpus": 8,
        "shards": 8,
        "bytes": 2,
        "batch": 256,
        "eager": False,
        "kl": True,
        "recompute": 0.0,
        "offload": False,
    }
    # the rates of a data sheet and of the simulator, whatever has been measured since
    rates = {"bandwidth_tbs": 3.35, "bandwidth_reached": 0.8, "prefill_mfu": 0.5, "train_mfu": 0.4, "sequence_us": 10.0}
    rates["iteration_us"] = 0.0
    known = read_table()["h100"].rates
    hardware = Hardware("h100", {**known, **{name: Rate(value, "a test") for name, value in rates.items()}})
    return Roofline(shape, hardware, Lengths(1200, 200, 2000, 8192), **{**options, **changes})  # type: ignore[arg-type]


def test_decode_time_is_near_the_simulators_for_its_own_workload() -> None:
    """64 x 8 rollouts of 2k tokens on 8 engines take 81 s a step there, synchronous, longest first (rollouts.md)."""
    assert roofline().rollouts(512) == pytest.approx(81, rel=0.2)


def test_learning_takes_the_flops_of_its_passes_over_the_rate() -> None:
    forward = 512 * roofline().shape.forward_flops(PassWork.over([(0, 3200)], 2000))
    rate = 8 * 989e12 * 0.4
    assert roofline().learn(512, 0) == pytest.approx(4 * forward / rate)  # three of the policy, the base's one
    assert roofline(kl=False, recompute=1.0).learn(512, 0) == pytest.approx(4 * forward / rate)
    saved = 1000 * 3 / 4 + 200 / 2  # tokens of a context of which 1000 are shared by four, and 200 by two
    spared = 512 * 2 * roofline().shape.body * saved
    assert roofline(sharing=(4.0, 2.0)).learn(512, 0) == pytest.approx(4 * (forward - spared) / rate)
    assert roofline(offload=True).learn(512, 1) > roofline().learn(512, 1) > roofline().learn(512, 0)


def test_twice_the_gpus_are_faster_but_for_the_long_tail() -> None:
    one, two = roofline(gpus=8), roofline(gpus=16)
    assert one.learn(512, 0) == 2 * two.learn(512, 0)
    assert one.rollouts(512) > two.rollouts(512) > 8192 * 2 * 7.5e9 / (3.35e12 * 0.8)


# ------------------------------------------------------------------------------------------------------ what is said


def test_the_plan_says_what_is_not_measured_and_shows_its_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    ood = "codeio-ood:tests/data/codeio.jsonl"
    shown = planned([*FITS, "--reflector", "openai", "--price-per-gpu-hour", "2", "--eval.ood", ood], capsys)
    lines = shown.splitlines()
    (hours,) = (line for line in lines if line.startswith("GPU-hours"))
    words = hours.replace(",", "").replace(";", "").replace("$", "").split()
    seconds, total, cost = float(words[4]), float(words[9]), float(words[13])
    assert total == pytest.approx(8 * seconds / 3600, abs=0.06)
    assert cost == pytest.approx(2 * 8 * seconds / 3600, abs=0.02)
    assert "(NOT measured)" in hours
    assert any(line.startswith("the paper's runs of this model: 25 to 40 GPU-hours") for line in lines)
    rates = lines[next(i for i, line in enumerate(lines) if line.startswith("rates of h100")) + 1 :]
    assert all("measured" in line or "data sheet" in line for line in rates if line)
    assert "200 steps" in shown
    assert f"not looked at, not on this machine or too much work: jsonl:none.jsonl, {ood}" in lines


def test_the_plan_says_what_overlap_would_save_as_a_plan_with_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    def hours(*flags: str) -> tuple[float, list[str]]:
        lines = planned([*FITS, "--reflector", "openai", *flags], capsys).splitlines()
        (whole,) = (line for line in lines if line.startswith("GPU-hours"))
        return float(whole.partition("= ")[2].partition(";")[0]), [x.strip() for x in lines if x.startswith("  with -")]

    plain, offers = hours()
    assert len(offers) == 2
    for offer in offers:
        flags, _, total = offer.removeprefix("with ").partition(": ")
        assert "--rollout.lookahead 1 --fast.filler True" in flags
        with_them, further = hours(*flags.split())
        assert with_them == float(total) < plain
    assert not further


@pytest.mark.parametrize(
    ("row", "task", "tokens"),
    [
        ("| hover (2048), 500 |", "hover", "500"),
        ("| hover, 2000 |", "hover", "2000"),
        ("| codeio (4096), 500 |", "codeio", "500"),
        ("| codeio, 2000 |", "codeio", "2000"),
        ("| math (8192), 2000 |", "math", "2000"),
    ],
)
def test_the_gpu_hours_that_the_documents_quote_are_what_a_plan_says(
    row: str, task: str, tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--preset qwen3-8b-{task} --plan.response-tokens"
    shown = planned(["--plan", *flags.split(), tokens], capsys)
    said = [
        re.findall(r"= ([\d.]+); x", shown)[0],
        re.findall(r"with --rollout.lookahead 1 --fast.filler True: ([\d.]+)", shown)[0],
        re.findall(r"--fast.race False: ([\d.]+)", shown)[0],
    ]
    line = next(x for x in (RESULTS.parent / "README.md").read_text().splitlines() if x.startswith(row))
    assert line.replace("*", "").removeprefix(row).replace("|", " ").split() == said
    if row.startswith("| hover ("):
        readme = (RESULTS.parents[1] / "README.md").read_text()
        assert f"`{flags} {tokens}`: {said[0]} GPU-hours, with both kinds of overlap {said[1]}, and without" in readme


def test_a_plan_needs_a_config_json_alone_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    monkeypatch.chdir(tmp_path)
    shown = planned(["--plan", "--model.path", "model", "--plan.gpu", "a100", "--mode", "rl"], capsys)
    assert "rl of model" in shown
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "config.json"]


def test_every_rate_of_every_device_is_there_with_a_source() -> None:
    table = read_table()
    assert len({frozenset(h.rates) for h in table.values()}) == 1
    assert all(rate.source for h in table.values() for rate in h.rates.values())
    drivers = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "Tesla T4")
    assert [kind_of(name) for name in drivers] == ["h100", "a100", ""]


def test_plan_is_found_among_any_flags_and_sets_the_papers_recipe_for_a_real_model() -> None:
    command = parse_train(["--seed", "3", "--plan.gpus=4"])
    assert isinstance(command, PlanCommand)
    assert (command.plan.gpus, command.config.seed) == (4, 3)
    assert type(parse_train(["--seed", "3"])) is TrainCommand
    assert parse_train(["--plan", "--plan.model", "qwen3-8b"]).config.rollout.problems == Config().rollout.problems
    assert parse_train(["--plan"]).config.rollout.problems == GLYPH.rollout.problems
