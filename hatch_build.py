"""The hook that hatchling runs when it builds this package.

It compiles csrc/ if it can; otherwise PyTorch does the same work. pip shows the reason for a failure only with
-v, so the hook writes it into a note in the library's place, and the package can report it.
"""

import contextlib
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
NOTE = "spectralmetrics/sums/_accumulate.txt"  # read by src/spectralmetrics/sums/library.py
OPTIONS = "-std=c++17 -O3 -ffp-contract=fast -fPIC -shared -fvisibility=hidden -fno-exceptions -fno-rtti"


class CompileHook(BuildHookInterface):
    """Puts the shared library into a wheel of this platform, or into the source tree of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds a wheel or an editable install."""
        if self.target_name != "wheel" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        self._folder = tempfile.mkdtemp()
        library, note = Path(self._folder, "library.so"), Path(self._folder, "note.txt")
        try:
            self._compile(library)
            self._put(version, library, LIBRARY, build_data)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{error}\n{getattr(error, 'stderr', '')}")
            self.app.display_warning(f"{SOURCE} is not compiled: its work will be left to PyTorch")
            note.write_text(f"{in_short(error)}\n", encoding="utf-8")
            with contextlib.suppress(OSError):
                self._put(version, note, NOTE, build_data)
            return
        build_data["pure_python"] = False
        # Nothing in the library depends on the version of Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling after it has written the wheel."""
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _compile(self, library: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        command = [*compiler, *OPTIONS.split(), "-o", str(library), str(Path(self.root, SOURCE))]
        subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
        if not library.exists():
            raise OSError(f"{shlex.join(command)} has written nothing")

    def _put(self, version: str, made: Path, path: str, build_data: dict[str, Any]) -> None:
        """Put the library or the note into the wheel or the source tree, where it replaces an older one."""
        if version != "editable":
            build_data["force_include"][str(made)] = path
            return
        target = Path(self.root, "src", path)
        # A running process may have the old file mapped, so a new file must replace it.
        new = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made, new)
        new.replace(target)
        for other in {LIBRARY, NOTE} - {path}:
            Path(self.root, "src", other).unlink(missing_ok=True)


def in_short(error: Exception) -> str:
    """An error in one line; for a compiler: its name, exit status and first error message."""
    if not isinstance(error, subprocess.CalledProcessError):
        return " ".join(str(error).split())
    messages = [line.strip() for line in error.stderr.splitlines() if "error" in line]
    return ": ".join([f"{error.cmd[0]} returned exit status {error.returncode}", *messages[:1]])
