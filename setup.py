"""Builds the optional compiled novelty engine; everything else about the package is in pyproject.toml.

`_core.c` has a plain C ABI and no Python.h, so one library serves every Python: the wheel is tagged
py3-none-<platform>. Where no compiler is found the build goes on without it, the wheel is py3-none-any, and the numpy
engine gives the same results.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1: enough for `build_ext --inplace`, but not for a wheel
    bdist_wheel = None


class BuildCore(build_ext):
    """Knows that the library exports no PyInit function, and what its compiler takes."""

    def get_export_symbols(self, ext):
        return []

    def build_extensions(self):
        for extension in self.extensions:
            extension.extra_compile_args = self._flags()
        super().build_extensions()

    def _flags(self):
        if self.compiler.compiler_type == "msvc":
            return ["/O2"]
        # One instruction more than the oldest x86-64 has: without it each population count is a function call.
        with_count = sys.platform != "darwin" and platform.machine().lower() in ("x86_64", "amd64")
        return ["-O3", "-g0", "-std=c99", "-fvisibility=hidden", *(["-mpopcnt"] if with_count else [])]


COMMANDS = {"build_ext": BuildCore}

if bdist_wheel is not None:

    class PlatformWheel(bdist_wheel):
        """Tags the wheel by platform alone, or as pure when the core was not built."""

        def run(self):
            self.run_command("build")
            build_folder = Path(self.get_finalized_command("build").build_lib)
            self.root_is_pure = not any(build_folder.glob("selfinstruct/novelty/_core*[!c]"))
            if self.root_is_pure:
                self.distribution.ext_modules = []  # or all files would go to the platform's folder
            super().run()

        def get_tag(self):
            return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])

    COMMANDS["bdist_wheel"] = PlatformWheel

setup(
    ext_modules=[
        Extension("selfinstruct.novelty._core", ["selfinstruct/novelty/_core.c"], optional=True, py_limited_api=True)
    ],
    cmdclass=COMMANDS,
)
