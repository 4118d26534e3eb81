"""Builds csrc/. Everything else is in pyproject.toml. A missing compiler costs a warning, never the install.

FST_CUDA=1 also has nvcc build the row kernel for Hopper GPUs; without it nothing of CUDA is touched.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# On Linux torch brings GNU's OpenMP, whose threads csrc then shares; elsewhere csrc starts its own.
THREADS = "-fopenmp" if sys.platform == "linux" else "-pthread"

EXTENSIONS = [
    Extension(
        "fst_fast._csrc",  # a plain shared library for ctypes, not a Python module
        ["csrc/prefix_tree.cpp"],
        extra_compile_args=["-O3", "-std=c++17"],
        optional=True,
    ),
    Extension(
        "fst_kernels._csrc",  # likewise; picks AVX-512, AVX2 or neither at run time, so it may travel in a wheel
        ["csrc/policy_rows.cpp"],
        depends=["csrc/policy_rows_kernel.h"],
        extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=fast", THREADS],
        extra_link_args=[THREADS],
        optional=True,
    ),
]
if os.environ.get("FST_CUDA") == "1":
    EXTENSIONS.append(
        Extension(
            "fst_kernels._cuda",  # likewise; the CUDA runtime is inside, so that any torch will do
            ["csrc/row_cluster.cu"],
            depends=["csrc/hopper.h"],
            # Without -fmad=false two passes over a row would round differently: log-probs above 0.
            extra_compile_args=["-O3", "-std=c++17", "-fmad=false", "-gencode=arch=compute_90a,code=sm_90a"],
            optional=True,
        )
    )


class BuildWhatCanBe(build_ext):
    """setuptools' own build, nvcc's for an extension of one .cu, and one warning about those that failed."""

    def run(self) -> None:
        self.failed: list[str] = []
        super().run()
        if self.failed:
            print("WARNING: fst-fast is installed without", "; ".join(self.failed), file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.sources[0].endswith(".cu"):
                self._nvcc(ext)
            else:
                super().build_extension(ext)
        except (OSError, subprocess.CalledProcessError, BaseError, CCompilerError) as error:
            self.failed.append(f"{ext.name} ({error})")

    def _nvcc(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"
        command = [nvcc, *ext.extra_compile_args, *ext.sources]
        subprocess.run([*command, "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-o", target], check=True)


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildWhatCanBe})
