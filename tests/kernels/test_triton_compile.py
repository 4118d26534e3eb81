"""Every launch of the Triton backend, compiled for Hopper without a Hopper: registers, spills, width of accesses."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_kernels.blocks import Ask, Measures, Multiplier
from fst_kernels.objective import Objective, PolicyRows
from fst_kernels.types import Head, Logits

triton = pytest.importorskip("triton", reason="triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
if not (TOOLS / "ptxas").exists():
    pytest.skip("this triton has no compiler for NVIDIA", allow_module_level=True)

from fst_kernels import triton_kernels, triton_matrix  # noqa: E402 (they import triton)

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
PLAIN: dict[str, Any] = {"kind": "cispo", "grad_dtype": torch.bfloat16}
EVERYTHING: dict[str, Any] = {"entropy": 0.1, "kl": 0.1, "softcap": 30.0, "temperature": "per token", "bias": True}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "cispo": PLAIN,
    "ppo": PLAIN | {"kind": "ppo"},
    "reinforce": PLAIN | {"kind": "reinforce"},
    "fp32": PLAIN | {"grad_dtype": torch.float32},
    "entropy": PLAIN | {"entropy": 0.1},
    "temperature": PLAIN | {"temperature": "one"},
    "softcap": PLAIN | {"softcap": 30.0},
    "kl-measured": PLAIN | {"kl": 0.0},
    "kl": PLAIN | {"kl": 0.1},
    "everything": PLAIN | EVERYTHING,
    "everything-fp32": PLAIN | EVERYTHING | {"grad_dtype": torch.float32},
    "measure": {"kind": None},
    "measure-everything": EVERYTHING | {"kind": None},
    "measure-backward": PLAIN | {"kind": "given"},
    "measure-backward-everything": PLAIN | EVERYTHING | {"kind": "given"},
    "reverse-kl": PLAIN | EVERYTHING | {"kind": "given", "forward_kl": False},
}


class Recorder:
    """Stands in for the kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


def _launch(
    kind: str | None,
    grad_dtype: torch.dtype = torch.float32,
    entropy: float | None = None,
    kl: float | None = None,
    softcap: float | None = None,
    temperature: str | None = None,
    bias: bool = False,
    forward_kl: bool = True,
    v: int = 1001,
) -> Recorder:
    """One row step of this configuration, recorded instead of run."""
    from fst_kernels import triton_backend

    temperatures = {None: torch.tensor(1.0), "one": torch.tensor(0.6), "per token": torch.ones(4)}
    head = Head(
        torch.ones(4, 3),
        torch.ones(v, 3),
        torch.ones(v, dtype=torch.bfloat16) if bias else None,
        temperatures[temperature],
        softcap,
    )
    logits, n = Multiplier(head, torch.float32).logits(torch.arange(4)), torch.ones(4)
    targets = torch.zeros(4, dtype=torch.int64)
    upstream: Measures | PolicyRows | None = None
    if kind == "given":
        upstream = Measures(n, n if entropy else None, n if kl else None, n)
    elif kind is not None:
        objective = Objective(kind, 0.0, 4.0)
        upstream = PolicyRows(targets, n, n, n > 0, n, objective, entropy or 0.0, kl or 0.0)
    ask = Ask(targets, kind not in (None, "given") or bool(entropy), None if kl is None else logits, forward_kl)
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "row_kernel", recorder)
        triton_backend.row_step(logits, ask, upstream, None if kind is None else logits.room(grad_dtype))
    assert recorder.grid == (4,)
    return recorder


def _compile(function: Any, recorder: Recorder) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = function.arg_names
    given = dict(zip(names, recorder.args, strict=False)) | recorder.options
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if value is None or i >= len(recorder.args):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        specialized = signature[name] == "i32" and not function.params[i].do_not_specialize
        if isinstance(value, torch.Tensor) or (specialized and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in recorder.options.items() if k not in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _inspect(kernel: Any, folder: Path) -> tuple[int, str, str]:
    """(registers, ptxas's report, machine code), assembled for sm_90a."""
    (folder / "k.ptx").write_text(kernel.asm["ptx"])
    command = [TOOLS / "ptxas", "-v", "--gpu-name", "sm_90a", folder / "k.ptx", "-o", folder / "k.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    code = ""
    if (TOOLS / "nvdisasm").exists():
        command = [TOOLS / "nvdisasm", "-c", folder / "k.cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Used (\d+) registers", report)
    assert found
    return int(found[1]), report, code


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_launch_compiles_for_hopper_without_spills(name: str, tmp_path: Path) -> None:
    options = CONFIGURATIONS[name]
    kernel = _compile(triton_kernels.row_kernel, _launch(**options))
    registers, report, code = _inspect(kernel, tmp_path)
    print(f"{name}: {registers} registers, {kernel.metadata.shared} bytes of shared memory")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert registers <= 80  # three programs of 256 threads a multiprocessor at least
    assert kernel.metadata.shared <= 16384  # bytes, of 228 KB for five programs
    if code:
        assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", code)
        # 16 bytes a load of logits whatever V is, here 1001; so too the stores of the gradient.
        assert code.count("LDG.E.128") >= (2 if options["kind"] is None else 3)
        assert bool(re.search(r"STG\.E\.(128|64)", code)) == (options["kind"] is not None)


@pytest.mark.parametrize(("name", "most"), [("measure", 16), ("cispo", 17), ("everything", 144)])
def test_threads_measure_alone_and_in_few_instructions(name: str, most: int, tmp_path: Path) -> None:
    """Neighbours are joined within their thread: an exchange, or a state an item (27 instructions), takes longer than
    the memory."""
    from fst_kernels import triton_backend

    _, _, code = _inspect(_compile(triton_kernels.row_kernel, _launch(**CONFIGURATIONS[name])), tmp_path)
    if not code:
        pytest.skip("this triton has no disassembler")
    loop = _first_loop(code)
    assert not [x for x in loop if re.search(r"\b(SHFL|BAR|LDS|STS)\b", x)]
    items = triton_backend.BLOCK // (32 * triton_backend.WARPS)
    print(f"{name}: {len(loop) / items:.1f} instructions an item")
    assert len(loop) <= most * items


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_measure_alone_where_no_load_is_wide(dtype: torch.dtype, tmp_path: Path) -> None:
    from fst_kernels import triton_backend

    recorder, logits = Recorder(), Logits(torch.ones(4, 50257, dtype=dtype), None, torch.tensor(1.0), None, ours=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "row_kernel", recorder)
        triton_backend.row_step(logits, Ask(torch.zeros(4, dtype=torch.int64), False), None, None)
    _, _, code = _inspect(_compile(triton_kernels.row_kernel, recorder), tmp_path)
    if not code:
        pytest.skip("this triton has no disassembler")
    assert not [x for x in _first_loop(code) if re.search(r"\b(SHFL|BAR|LDS|STS)\b", x)]


def _first_loop(code: str) -> list[str]:
    """Its instructions."""
    lines = code.splitlines()
    begins = {x.rstrip(":"): i for i, x in enumerate(lines) if x.startswith(".L_")}
    for i, line in enumerate(lines):
        back = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if back and begins.get(back[1], i) < i:
            return [x for x in lines[begins[back[1]] : i + 1] if ";" in x]
    raise AssertionError("no loop")


@pytest.mark.parametrize("name", ["fp32", "everything-fp32"])
def test_the_target_is_read_by_all_threads_before_one_overwrites_its_logit(name: str, tmp_path: Path) -> None:
    _, _, code = _inspect(_compile(triton_kernels.row_kernel, _launch(**CONFIGURATIONS[name])), tmp_path)
    if not code:
        pytest.skip("this triton has no disassembler")
    accesses = re.findall(r"\b(LDG\.E\.64|LDG\.E|BAR|STG\.E\.128)(?= |\.SYNC)", code)
    target = accesses.index("LDG.E.64")
    chosen = accesses.index("LDG.E", target)
    assert "BAR" in accesses[chosen : accesses.index("STG.E.128", chosen)]


def test_a_narrow_gradient_waits_for_the_whole_program_before_it_overwrites_logits(tmp_path: Path) -> None:
    _, _, code = _inspect(_compile(triton_kernels.row_kernel, _launch(**PLAIN)), tmp_path)
    if not code:
        pytest.skip("this triton has no disassembler")
    events = re.findall(r"LDG\.E\.128|BAR\.SYNC|STG\.E\.128", code)
    store = events.index("STG.E.128")
    assert events[store - 1] == "BAR.SYNC"
    assert events[store - 2] == "LDG.E.128"


# ---- the matrix kernel -----------------------------------------------------------------------------------------------

FIRST = triton_matrix.CONFIGURATIONS[0]
MATRIX_LAUNCHES: list[tuple[triton_matrix.Tiles, dict[str, Any]]] = [
    *((tiles, {}) for tiles in triton_matrix.CONFIGURATIONS),
    *((FIRST, {name: value}) for name, value in [("entropy", False), ("bias", True), ("softcap", 30.0)]),
    (FIRST, {"dtype": torch.float16}),
]


def _launch_matrix(
    tiles: triton_matrix.Tiles,
    dtype: torch.dtype = torch.bfloat16,
    entropy: bool = True,
    softcap: float | None = None,
    bias: bool = False,
) -> Recorder:
    n, h, v = 4 * tiles.rows, 1024, 4099
    hidden, weight = torch.ones(n, h, dtype=dtype), torch.ones(v, h, dtype=dtype)
    head = Head(hidden, weight, torch.ones(v, dtype=dtype) if bias else None, torch.tensor(0.6), softcap)
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_matrix, "matrix_kernel", recorder)
        triton_matrix.measure(head, torch.zeros(n, dtype=torch.int64), entropy, tiles)
    return recorder


@pytest.mark.parametrize(("tiles", "options"), MATRIX_LAUNCHES)
def test_the_matrix_kernel_multiplies_from_the_copy_engine_on_wgmma_and_fits(
    tiles: triton_matrix.Tiles, options: dict[str, Any], tmp_path: Path
) -> None:
    kernel = _compile(triton_matrix.matrix_kernel, _launch_matrix(tiles, **options))
    registers, report, code = _inspect(kernel, tmp_path)
    print(f"{tiles} {options}: {registers} registers, {kernel.metadata.shared} bytes of shared memory")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "wgmma.mma_async instructions are serialized" not in report
    assert tiles.programs * tiles.warps * 32 * (-(-registers // 8) * 8) <= 65536
    assert tiles.programs * (kernel.metadata.shared + 1024) <= 228 * 1024
    if code:
        assert not re.search(r"\b(LDL|STL|ATOM|RED|HMMA)\b", code)
        # Of each step: the products go out, those of the step before are waited for, the operands of a step further on
        # are sent for, and then only the softmax waits for the last products: it runs while those operands arrive.
        found = re.findall(r"HGMMA|DEPBAR\.LE gsb0, 0x\d|UTMALDG|MUFU\.EX2", code)
        loop = ["HGMMA", "DEPBAR.LE gsb0, 0x1", "UTMALDG", "DEPBAR.LE gsb0, 0x0", "MUFU.EX2"]
        assert _holds(found, loop), found
        # Those overwrite operands of the step before, which other warps multiplied as well: all have waited by then.
        found = re.findall(r"HGMMA|DEPBAR\.LE gsb0, 0x\d|BAR\.SYNC|UTMALDG", code)
        assert _holds(found, ["HGMMA", "DEPBAR.LE gsb0, 0x1", "BAR.SYNC", "UTMALDG"]), found


def _holds(events: list[str], wanted: list[str]) -> bool:
    """Whether these follow one another, each perhaps several times."""
    steps = [event for event, following in zip(events, [*events[1:], ""], strict=True) if event != following]
    return any(steps[i : i + len(wanted)] == wanted for i in range(len(steps)))
