"""Builds csrc/. Everything else is in pyproject.toml. A missing compiler costs a warning, never the install."""

import sys

from setuptools import Extension, setup

# On Linux torch brings GNU's OpenMP, whose threads csrc then shares; elsewhere csrc starts its own.
THREADS = "-fopenmp" if sys.platform == "linux" else "-pthread"

setup(
    ext_modules=[
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
)
