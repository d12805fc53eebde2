"""The native extension; everything else is declared in pyproject.toml.

It is optional: where it does not compile, installation goes on, and PyTorch computes in its place. Plain C functions in
a shared library, which the package loads with ctypes: no headers of torch or Python, no tie to their binary interfaces
but to Python's capsules, which are part of the stable one.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "kernels/cpu"
# Of which fusedbayes.kernels.cpu.native computes the same hash.
SOURCES = ("fused.cpp", "pool.h", "vectors.h", "pieces.h", "passes.h", "mixture.h")
LIBRARY = "libfused.so.1"  # and looks for this name

content = b"".join((Path(__file__).parent / FOLDER / name).read_bytes() for name in SOURCES)
source_hash = int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


class BuildLibrary(build_ext):
    """Builds a library that no Python imports, so without the suffix of one of its extensions."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(LIBRARY))


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "fusedbayes.kernels.cpu._fused",
            [f"{FOLDER}/fused.cpp"],
            depends=[f"{FOLDER}/{name}" for name in SOURCES[1:]],
            define_macros=[("FUSEDBAYES_SOURCE_HASH", f"{source_hash}u")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fno-fast-math",  # whatever CXXFLAGS says
                "-pthread",
                "-Wno-psabi",  # vectors are passed between functions that are inlined
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
