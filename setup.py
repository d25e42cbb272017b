"""Builds `asyncckpt._native`, the engine, with a C++17 compiler alone: no CMake, CUDA or torch headers.

One extension is linked from csrc/*.cpp and nanobind's own sources, which nanobind ships as one
translation unit (`nb_combined.cpp`) for builds like this one. Everything else is in pyproject.toml.

Environment:
    CXX, CXXFLAGS, LDFLAGS   the compiler and flags to add.
    ASYNCCKPT_WERROR=1       warnings in csrc/ are errors. Off for users: their compiler may be newer.
    ASYNCCKPT_SANITIZE=LIST  "address,undefined" or "thread". Preload the sanitizer's runtime to import
                             the result: LD_PRELOAD=$(c++ -print-file-name=libasan.so).
    ASYNCCKPT_JOBS=N         compilers to run at once; the number of usable CPUs unless given.

Objects are kept in build/native, one directory for each set of flags, and compiled again only when
their source or a header of ours changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "native"
log = logging.getLogger("asyncckpt.build")
SANITIZERS = ("address", "undefined", "thread", "leak")


def fail(message: str) -> SystemExit:
    """An error without a traceback: who installs can act on the text alone."""
    return SystemExit(f"asyncckpt: {message}")


def find_compiler() -> list[str]:
    """$CXX, else the compiler that Python was built with, else the first usual name on PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        return given
    built_with = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    for name in (*built_with, "c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise fail("no C++ compiler found: install g++ (or clang++), or set CXX")


def python_includes() -> list[str]:
    """Where Python.h and pyconfig.h are."""
    paths = sysconfig.get_paths()
    folders = list(dict.fromkeys((paths["include"], paths["platinclude"])))
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        raise fail(f"Python.h is not in {folders[0]}: install Python's headers (python3-dev on Debian)")
    return folders


class Recipe:
    """The flags of this build, read from the environment once."""

    def __init__(self) -> None:
        import nanobind  # metadata can be asked for before it is installed

        self.compiler = find_compiler()
        package = Path(nanobind.include_dir()).parent  # nanobind 2.4 and older have no source_dir()
        self.nanobind_source = package / "src" / "nb_combined.cpp"
        robin_map = package / "ext" / "robin_map" / "include"
        system = [*python_includes(), nanobind.include_dir(), str(robin_map)]

        sanitize = [name for name in os.environ.get("ASYNCCKPT_SANITIZE", "").split(",") if name]
        unknown = [name for name in sanitize if name not in SANITIZERS]
        if unknown:
            raise fail(f"ASYNCCKPT_SANITIZE={unknown[0]}: choose from {', '.join(SANITIZERS)}")
        joined = ",".join(sanitize)
        self.instrument = [f"-fsanitize={joined}", "-fno-sanitize-recover=all"] if sanitize else []

        # NDEBUG must be the same in every object: nanobind's ABI tag depends on it.
        self.flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-pthread"]
        self.flags += [flag for folder in system for flag in ("-isystem", folder)]
        if sanitize:
            self.flags += ["-O1", "-g", "-fno-omit-frame-pointer", *self.instrument]
        else:
            self.flags += ["-DNDEBUG", "-DNB_COMPACT_ASSERTIONS", "-ffunction-sections", "-fdata-sections"]
        self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.werror = os.environ.get("ASYNCCKPT_WERROR", "0") not in ("", "0")
        self.fingerprint = f"{nanobind.__version__} {version_of(self.compiler)}"

    def compile_flags(self, source: Path) -> list[str]:
        """The flags for one source: ours is tuned for speed, nanobind's glue for size."""
        if source == self.nanobind_source:
            return [*self.flags, *([] if self.instrument else ["-Os"]), "-DNB_BUILD", *self.extra]
        warnings = ["-Wall", "-Wextra", "-Werror"] if self.werror else []
        return [*self.flags, *([] if self.instrument else ["-O3"]), *warnings, *self.extra]

    def link(self, objects: list[Path], target: Path) -> None:
        """Link beside the target, then rename: a process that has the old file mapped keeps it."""
        slim = [] if self.instrument else ["-Wl,--gc-sections", "-Wl,-s"]
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        extra = shlex.split(os.environ.get("LDFLAGS", ""))
        libraries = ["-pthread", "-ldl"]
        command = [*self.compiler, "-shared", *self.instrument, *slim, *map(str, objects)]
        run([*command, "-o", str(fresh), *libraries, *extra])
        fresh.replace(target)

    def compile(self, source: Path) -> Path:
        """Compile one source unless its object is up to date; returns the object."""
        flags = self.compile_flags(source)
        parts = [str(ROOT), *self.compiler, self.fingerprint, *flags]  # depfiles name absolute paths
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
        target = OBJECTS / key / f"{source.stem}.o"
        depfile = target.with_suffix(".d")
        if is_current(target, depfile):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        command = [*self.compiler, *flags, "-MMD", "-MF", str(depfile), "-MT", "object", "-c", str(source)]
        run([*command, "-o", str(fresh)])
        fresh.replace(target)
        return target


def version_of(compiler: list[str]) -> str:
    """First line of the compiler's --version, so that an upgrade compiles everything again."""
    try:
        answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise fail(f"{shlex.join(compiler)} does not run: {error}") from None
    return answer.stdout.partition("\n")[0]


def is_current(target: Path, depfile: Path) -> bool:
    """True when the object is newer than its source and every header named in its depfile."""
    try:
        made_at = target.stat().st_mtime_ns
        rule = depfile.read_text().partition(":")[2].replace("\\\n", " ")
        return all(Path(name).stat().st_mtime_ns < made_at for name in shlex.split(rule))
    except OSError:  # no object yet, or a header went away
        return False


def run(command: list[str]) -> None:
    """Run one tool, showing its command line as distutils would."""
    log.info(shlex.join(command))  # shown unless -q
    answer = subprocess.run(command, check=False)
    if answer.returncode != 0:
        raise fail(f"{command[0]} failed with status {answer.returncode}; its message is above")


class BuildNative(build_ext):
    """Compiles in parallel and incrementally, which setuptools' own build_ext does not."""

    def build_extension(self, ext: Extension) -> None:
        if not sys.platform.startswith("linux"):
            raise fail(f"the engine needs Linux (O_DIRECT, memfd), not {sys.platform}")
        recipe = Recipe()
        # nanobind's unit takes longest: first in line, so that the others fill the other CPUs.
        sources = [recipe.nanobind_source, *(ROOT / name for name in ext.sources)]
        jobs = int(os.environ.get("ASYNCCKPT_JOBS") or len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(max(1, min(jobs, len(sources)))) as pool:
            objects = list(pool.map(recipe.compile, sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        recipe.link(objects, target)


setup(
    # Here and not in pyproject.toml: setuptools before 77 refuses the form that those after want.
    license="Apache-2.0",
    ext_modules=[
        Extension(
            "asyncckpt._native",
            sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
