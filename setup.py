"""``bdist_wheel --with-kernels``: a wheel that carries the compiled CPU kernels. See ``make wheel``."""

import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

HERE = Path(__file__).parent


class WheelWithKernels(bdist_wheel):
    user_options = [*bdist_wheel.user_options, ("with-kernels", None, "carry the CPU kernels, compiled")]  # noqa: RUF012
    boolean_options = [*bdist_wheel.boolean_options, "with-kernels"]  # noqa: RUF012

    def initialize_options(self) -> None:
        super().initialize_options()
        self.with_kernels = False

    def get_tag(self) -> tuple[str, str, str]:
        """The libraries are of one platform, and of no Python."""
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return ("py3", "none", platform) if self.with_kernels else super().get_tag()

    def write_wheelfile(self, wheelfile_base: str, *args: str) -> None:
        """Everything else of the wheel lies beside it by now."""
        if self.with_kernels:
            sys.path.insert(0, str(HERE))
            from llm42c.codegen.cpu import build

            build.carry(Path(wheelfile_base).parent / "llm42c" / "codegen" / "cpu")
        super().write_wheelfile(wheelfile_base, *args)


setup(cmdclass={"bdist_wheel": WheelWithKernels})
