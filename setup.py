"""Builds csrc/ into one shared library with a plain C ABI; everything else is in pyproject.toml.

The library is optional: without a compiler the install succeeds and the torch backend serves.
OpenMP calls are compiled in but libgomp is not linked: they resolve at load time to the runtime
that torch already brought into the process, so both use one thread pool and torch's thread count.
"""

import glob
import sys

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "fastpost_kernels._csrc_native",
            sources=sorted(glob.glob("csrc/*.cpp")),
            depends=sorted(glob.glob("csrc/*.h")),
            include_dirs=["csrc"],
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fno-signed-zeros",
                "-fvisibility=hidden",
            ],
            extra_link_args=[],
            language="c++",
            optional=True,
        )
    ]
    if sys.platform == "linux"
    else []
)
