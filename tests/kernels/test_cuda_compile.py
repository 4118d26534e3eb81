"""The CUDA row kernel compiled for Hopper without a Hopper, with setup.py's flags: registers, spills, instructions."""

import ctypes
import re
import runpy
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fst_kernels import cuda_backend

setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("there is no nvcc", allow_module_level=True)
ROOT = Path(__file__).parents[2]
REGISTERS, SHARED = 65536, 228 << 10  # of a multiprocessor, the latter in bytes
THREADS = 256


class Build(NamedTuple):
    report: str  # of ptxas
    path: Path

    def library(self) -> Any:
        return cuda_backend._Library(ctypes.CDLL(str(self.path)))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    settings: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FST_CUDA", "1")
        patch.setattr(setuptools, "setup", lambda **given: settings.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
    (extension,) = (x for x in settings["ext_modules"] if x.name == "fst_kernels._cuda")
    path = tmp_path_factory.mktemp("nvcc") / "_cuda.so"
    command = [str(NVCC), *extension.extra_compile_args, "-Xptxas", "-v", *extension.sources, "-o", str(path)]
    command += ["-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    return Build(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr, path)


@pytest.fixture(scope="module")
def kernels(build: Build) -> dict[str, str]:
    """Machine code by kernel."""
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := find_spec("triton")) is not None and triton.origin is not None:
        tool = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if tool is None:
        pytest.skip("there is no cuobjdump")
    code = subprocess.run([tool, "-sass", build.path], capture_output=True, text=True, check=True).stdout
    name, *rest = re.split(r"Function : \S*?row_kernelI(\w+?)Li256\S*", code)[1:]
    found = dict(zip([name, *rest[1::2]], rest[::2], strict=True))
    assert found.keys() == {"fLb0E", "fLb1E", "tLb0E", "tLb1E"}  # fp32 and bf16 logits, without and with a reference
    return found


def test_nothing_spills_and_three_blocks_share_a_multiprocessor(build: Build) -> None:
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", build.report)]
    assert len(registers) == 4
    assert build.report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 4
    assert 3 * THREADS * max(registers) <= REGISTERS


def test_rows_come_by_bulk_copies_and_leave_in_16_bytes_after_the_cluster_has_met(kernels: dict[str, str]) -> None:
    for name, code in kernels.items():
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|ATOMS|RED)\b", code)
        assert "UBLKCP" in code
        met = [m.start() for m in re.finditer("UCGABAR_WAIT", code)]
        assert len(met) == 2
        stores = [m.start() for m in re.finditer(r"STG\.E\.128", code)]
        assert len(stores) == 3  # eight of bf16, or two times four of fp32
        assert min(stores) > max(met)
        loads = re.findall(r"LDG\.E\S*", code)
        assert set(loads) <= {"LDG.E", "LDG.E.64", "LDG.E.CONSTANT", "LDG.E.64.CONSTANT"}  # vectors, and a bias
        assert ("LDS.128" if name.startswith("f") else "LDS.64") in code


def test_the_copy_engine_and_the_other_blocks_see_what_was_written_for_them(kernels: dict[str, str]) -> None:
    """On a GPU no test would tell: what a missing fence lets through is rare."""
    names = "EXCH|FENCE.VIEW|UBLKCP|PHASECHK|LDS|ST.E.128|MEMBAR.ALL.GPU|UCGABAR_ARV|UCGABAR_WAIT|CCTL.IVALL"
    for code in kernels.values():
        events = re.findall(rf"\b({names})", code)
        steps = [event for event, following in zip(events, [*events[1:], ""], strict=True) if event != following]
        copies, first_read = steps.index("UBLKCP"), steps.index("LDS")
        assert steps[copies - 2 : copies] == ["EXCH", "FENCE.VIEW"]  # a tile's barrier, before its copy
        assert steps[first_read - 1] == "PHASECHK"
        # A state goes to the other blocks between the cluster's barriers: released, then acquired.
        told = steps.index("ST.E.128")
        assert steps[told - 3 : told] == ["UCGABAR_WAIT", "CCTL.IVALL", "LDS"]
        assert steps[told + 1 : told + 6] == ["MEMBAR.ALL.GPU", "UCGABAR_ARV", "UCGABAR_WAIT", "CCTL.IVALL", "LDS"]


@pytest.mark.parametrize(
    ("v", "item_bytes", "cluster", "blocks"),
    [
        (1, 4, 1, 3),
        (16384, 4, 1, 3),
        (19200, 4, 2, 3),  # a KB of every block is the system's
        (32768, 4, 2, 3),
        (128256, 4, 8, 3),
        (151936, 4, 8, 3),
        (256000, 4, 16, 3),
        (151936, 2, 4, 3),  # bf16 logits
        (151936, 8, 16, 3),  # with a reference
        (256000, 8, 16, 1),
    ],
)
def test_clusters_are_the_smallest_that_let_the_most_blocks_share_a_multiprocessor(
    build: Build, v: int, item_bytes: int, cluster: int, blocks: int
) -> None:
    size = build.library().cluster_size
    assert size(v, item_bytes) == cluster
    a_slice = -(-v // cluster) * item_bytes + 1024
    assert blocks * a_slice <= SHARED
    assert blocks == 3 or (blocks + 1) * a_slice > SHARED


def test_a_row_that_no_cluster_holds_has_no_cluster(build: Build) -> None:
    assert build.library().cluster_size(470_000, 8) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_it_loads_and_a_launch_is_a_clear_error(build: Build) -> None:
    with pytest.raises(RuntimeError, match=r"the CUDA row kernel did not start .*driver"):
        build.library().launch(cuda_backend._Rows(n=1, v=8), 1, None)
