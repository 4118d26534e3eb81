"""What the install promises, each in a fresh interpreter."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_the_kernels_import_nothing_of_the_trainer_or_of_transformers(tmp_path: Path) -> None:
    code = "import sys, fst_kernels; print(sorted({'fst_fast', 'transformers', 'vllm', 'gepa'} & set(sys.modules)))"
    assert python(code, tmp_path) == "[]\n"


def test_a_bare_install_says_what_the_trainer_needs(tmp_path: Path) -> None:
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'pydantic' else find(name, *more)\n"
        "import fst_fast.prefix_tree\n"  # which needs nothing of it
        "del sys.modules['fst_fast']\n"
        "sys.argv = ['-m']\n"  # as python -m has it while it looks for the module
        "runpy.run_module('fst_fast.train', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    said = "error: the kernels are installed without what the trainer needs; pip install -e '.[train]'\n"
    assert (ended.returncode, ended.stderr) == (2, said)


def test_the_folder_kernels_is_not_taken_for_the_package_of_that_name() -> None:
    """PyPI has a package `kernels` that transformers looks for; from the repository's root it must not find ours."""
    code = (
        "import importlib.metadata, transformers.utils\n"
        "real = any(d.name == 'kernels' for d in importlib.metadata.distributions())\n"
        "print(transformers.utils.is_kernels_available() == real)\n"
        "from fst_fast.model import load_model\n"
        "import torch; print(load_model('').hidden(torch.tensor([[1, 2, 3]])).shape)"
    )
    assert python(code, ROOT) == "True\ntorch.Size([1, 3, 96])\n"


def test_without_the_compiled_helpers_python_takes_over_with_one_warning(tmp_path: Path) -> None:
    code = (
        "import importlib.util, warnings\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'fst_fast._csrc' else find(name, *a)\n"
        "from fst_fast.prefix_tree import Ragged, trie\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(*(trie(Ragged.of(x)).tokens for x in ([(1, 2), (1, 3)], [(1, 2), (1, 2, 3)])), len(caught))"
    )
    assert python(code, tmp_path) == "3 3 1\n"


def test_without_any_compiler_the_build_succeeds_with_one_warning_that_names_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    nowhere = str(tmp_path / "nowhere")
    environment = os.environ | {"CC": nowhere, "CXX": nowhere, "CUDA_HOME": nowhere, "PATH": nowhere, "FST_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (warning,) = (line for line in run.stderr.splitlines() if line.startswith("WARNING"))
    assert all(f"{name} ([Errno 2]" in warning for name in ("fst_fast._csrc", "fst_kernels._csrc", "fst_kernels._cuda"))
    assert not list(tmp_path.rglob("*.so"))


def test_nothing_of_cuda_is_built_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    names: list[str] = []
    monkeypatch.setattr(setuptools, "setup", lambda ext_modules, **_: names.extend(x.name for x in ext_modules))
    for asked, expected in (("0", 2), ("1", 3)):
        names.clear()
        monkeypatch.setenv("FST_CUDA", asked)
        runpy.run_path(str(ROOT / "setup.py"))
        assert len(names) == expected
        assert ("fst_kernels._cuda" in names) == (asked == "1")
