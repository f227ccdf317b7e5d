"""Compiles csrc/ while the package is built, where that is possible; PyTorch does the same work without it."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "csrc/accumulate.cpp"
LIBRARY = "src/spectralmetrics/functional/_accumulate.so"
OPTIONS = (
    "-std=c++17 -O3 -ffp-contract=fast -fPIC -shared -fvisibility=hidden -fno-exceptions -fno-rtti -Wno-psabi"
)


class CompileHook(BuildHookInterface):
    """Puts the shared library beside the module that loads it, and into a wheel of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel, or an editable install, is put together."""
        if self.target_name != "wheel":
            return
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)  # it may be of another version
        if self._compile(library):
            build_data["artifacts"].append(LIBRARY)
            build_data["pure_python"] = False
            # Nothing in the library depends on the version of Python.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _compile(self, library: Path) -> bool:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return False
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(compiler[0]) is None:
            self.app.display_warning(f"no C++ compiler {compiler[0]!r}: products will be left to PyTorch")
            return False
        # A running process may have the old file mapped: the new one must be another.
        new = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, *OPTIONS.split(), "-o", str(new), str(Path(self.root, SOURCE))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            self.app.display_warning(
                f"{shlex.join(command)}\n{result.stderr}\nproducts will be left to PyTorch"
            )
            new.unlink(missing_ok=True)
            return False
        new.replace(library)
        return True
