"""Compiles csrc/ while the package is built, where that is possible; PyTorch does the same work without it."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "csrc/accumulate.cpp"
LIBRARY = "spectralmetrics/sums/_accumulate.so"
OPTIONS = "-std=c++17 -O3 -ffp-contract=fast -fPIC -shared -fvisibility=hidden -fno-exceptions -fno-rtti"


class CompileHook(BuildHookInterface):
    """Puts the shared library into a wheel of this platform, or into the source tree of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel, or an editable install, is put together."""
        if self.target_name != "wheel" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        self._folder = tempfile.mkdtemp()
        library = Path(self._folder, "library.so")
        try:
            self._compile(library)
            if version == "editable":
                self._put_into_tree(library)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{error}\n{getattr(error, 'stderr', '')}")
            self.app.display_warning(f"{SOURCE} is not compiled: its work will be left to PyTorch")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = LIBRARY
        build_data["pure_python"] = False
        # Nothing in the library depends on the version of Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling when the wheel has been written."""
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _compile(self, library: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        command = [*compiler, *OPTIONS.split(), "-o", str(library), str(Path(self.root, SOURCE))]
        subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
        if not library.exists():
            raise OSError(f"{shlex.join(command)} has written nothing")

    def _put_into_tree(self, library: Path) -> None:
        target = Path(self.root, "src", LIBRARY)
        # A running process may have the old file mapped: the new one must be another.
        new = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, new)
        new.replace(target)
