"""What pyproject.toml cannot say: csrc/ travels inside the package, and FASTODE_PREBUILD=1 compiles it on install."""

import importlib
import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PREBUILD = os.environ.get("FASTODE_PREBUILD", "0") not in {"", "0"}


class BuildWithSources(build_py):
    """Copies csrc/ to where the JIT looks for it in an installed package, and builds it if asked to."""

    def run(self) -> None:
        super().run()
        package = HERE / "fastode"
        if not self.editable_mode:  # an editable install uses the checkout's csrc/
            package = Path(self.build_lib) / "fastode"
            shutil.rmtree(package / "csrc", ignore_errors=True)
            shutil.copytree(HERE / "csrc", package / "csrc", ignore=shutil.ignore_patterns("*.o", "*.so"))
        for outdated in package.glob("libfastode-*.so"):
            outdated.unlink()
        if PREBUILD:
            prebuild(package)


def prebuild(package: Path) -> None:
    """Compile the operators into `package`, for each instruction set that is told apart when they are loaded."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("FASTODE_PREBUILD=1 compiles against the installed torch: add --no-build-isolation")
    # As a package of its own: importing fastode itself would run more of it than a build should.
    native = types.ModuleType("fastode_native")
    native.__path__ = [str(HERE / "fastode" / "native")]
    sys.modules[native.__name__] = native
    toolchain = importlib.import_module("fastode_native.toolchain")
    nodes = importlib.import_module("fastode_native.nodes")
    nvcc = importlib.import_module("fastode_native.nvcc")
    try:
        print("fastode: built", *toolchain.build_ahead(HERE / "csrc", package))
    except toolchain.BuildError as error:
        sys.exit(f"FASTODE_PREBUILD=1: {error}")
    try:
        print("fastode: built", nodes.build_ahead(HERE / "csrc", package))
    except toolchain.BuildError as error:  # without them the Functions in Python run
        print(f"fastode: built without the autograd nodes: {error}", file=sys.stderr)
    try:
        print("fastode: built", *nvcc.build_ahead(HERE / "csrc", package))
    except toolchain.BuildError as error:  # a machine without nvcc builds for the CPU
        print(f"fastode: built without the CUDA operators: {error}", file=sys.stderr)


class PlatformDistribution(Distribution):
    """A wheel that holds a compiled library is for one platform."""

    def has_ext_modules(self) -> bool:
        return PREBUILD


setup(cmdclass={"build_py": BuildWithSources}, distclass=PlatformDistribution)
