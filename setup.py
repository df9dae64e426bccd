"""What pyproject.toml cannot say: csrc/ travels inside the package, and FASTODE_PREBUILD=1 compiles it on install."""

import importlib.util
import os
import shutil
import sys
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
    # By path: importing fastode itself would run more of the package than a build should.
    spec = importlib.util.spec_from_file_location("fastode_toolchain", HERE / "fastode" / "native" / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    toolchain = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = toolchain
    spec.loader.exec_module(toolchain)
    try:
        print("fastode: built", *toolchain.build_ahead(HERE / "csrc", package))
    except toolchain.BuildError as error:
        sys.exit(f"FASTODE_PREBUILD=1: {error}")


class PlatformDistribution(Distribution):
    """A wheel that holds a compiled library is for one platform."""

    def has_ext_modules(self) -> bool:
        return PREBUILD


setup(cmdclass={"build_py": BuildWithSources}, distclass=PlatformDistribution)
