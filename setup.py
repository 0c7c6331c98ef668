"""The build: pure Python, and with it the CUDA extension of csrc/ where nvcc and PyTorch are found.

HUT_KERNELS_CUDA=1 demands the extension, 0 leaves it out; without it, what is possible is built.
TORCH_CUDA_ARCH_LIST chooses the architectures, MAX_JOBS the compilers at work at once. torch's own
CUDAExtension wants a CUDA build of torch; the headers of any build suffice, so nvcc is called here.
Everything else is declared in pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = ("module.cpp", "ops.cpp", "runtime.cpp", "device.cpp", "weight.cu", "reduce.cu")
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
OLDEST_NVCC, OLDEST_TORCH = (12, 0), (2, 10)
FLAGS = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
HOST_FLAGS = "-fPIC,-fvisibility=hidden"
REPORT = "ptxas.txt"  # beside the objects: registers and spills of every kernel

_ROOT = Path(__file__).parent


class Impossible(Exception):
    """The reason why the extension cannot be built here, in one sentence."""


@dataclass(frozen=True)
class Toolchain:
    """The tools that the extension is built with.

    Attributes:
        nvcc: The CUDA compiler.
        cxx: The host compiler, which nvcc calls.
        torch: PyTorch's package folder.
        architectures: Such as `("80", "90", "120+PTX")`.
        jobs: Compilers at work at once.
    """

    nvcc: Path
    cxx: str
    torch: Path
    architectures: tuple[str, ...]
    jobs: int

    @property
    def includes(self) -> list[str]:
        """The include paths, as flags."""
        return [f"-I{folder}" for folder in (self.torch / "include", sysconfig.get_path("include"))]


def find_toolchain() -> Toolchain:
    """The compilers and PyTorch's headers.

    Raises:
        Impossible: Something is missing or too old.
    """
    if sys.platform != "linux":
        raise Impossible("it is for Linux")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Impossible(
            "PyTorch is not installed where the build runs (pip needs --no-build-isolation)"
        )
    version = importlib.metadata.version("torch")
    if _numbers(version) < OLDEST_TORCH:
        raise Impossible(f"PyTorch {version} is too old: 2.10 or newer is needed")
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not cxx:
        raise Impossible("there is no C++ compiler")
    nvcc = _find_nvcc()
    found = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if found is None or _numbers(found[1]) < OLDEST_NVCC:
        release = found[1] if found else "of an unknown release"
        raise Impossible(f"nvcc {release} is too old: 12.0 or newer is needed")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    supported = re.findall(r"compute_(\w+)", _output(nvcc, "--list-gpu-arch"))
    architectures = choose_architectures(wanted, supported)
    return Toolchain(nvcc, cxx, Path(torch.origin).parent, architectures, _jobs())


def choose_architectures(wanted: str | None, supported: Sequence[str]) -> tuple[str, ...]:
    """The architectures to build for, such as `("80", "90", "120+PTX")`.

    Args:
        wanted: In the form of TORCH_CUDA_ARCH_LIST, `"8.0;9.0+PTX"`; None means ours, as far as
            nvcc knows them. Below 8.0 there are no kernels, so such entries are left out.
        supported: What nvcc compiles for, such as `("80", "90")`.

    Raises:
        Impossible: An entry that nvcc does not know, or nothing left to build for.
    """
    chosen = []
    for entry in re.findall(r"[^\s;,]+", wanted or ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise Impossible(f'TORCH_CUDA_ARCH_LIST should look like "8.0;9.0+PTX"; got {entry!r}')
        major, minor, variant, ptx = match.groups(default="")
        if int(major) < 8:
            continue
        if f"{major}{minor}" in supported:
            chosen.append(f"{major}{minor}{variant}{ptx}")
        elif wanted:
            raise Impossible(f"nvcc does not know {entry}; it knows {', '.join(supported)}")
    if not chosen:
        raise Impossible(f"no architecture from 8.0 on is asked for (got {wanted!r})")
    if not wanted and not chosen[-1].endswith("+PTX"):  # an older nvcc: its newest, for later GPUs
        chosen[-1] += "+PTX"
    return tuple(chosen)


def generate_code(architectures: Sequence[str]) -> list[str]:
    """The flags of nvcc for the architectures."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_one(tools: Toolchain, source: Path, target: Path, flags: Sequence[str] = ()) -> str:
    """Compiles one file to an object, and returns what the compiler says."""
    if source.suffix == ".cu":
        own = [*generate_code(tools.architectures), "-Xptxas=-v"]
    else:
        names = f'-DHUT_ARCHITECTURES="{" ".join(tools.architectures)}"'
        # Errors name their place in the source, and should not name the builder's folders.
        own = [f"-Xcompiler=-Wall,-fmacro-prefix-map={_ROOT}/=", names]
    return run_nvcc(tools, [
        *FLAGS, *own, *flags, *tools.includes, "-c", str(source), "-o", str(target),
    ])  # fmt: skip


def link(tools: Toolchain, objects: Sequence[Path], target: Path) -> None:
    """Links objects to a shared library that finds libtorch already loaded.

    nvcc links its runtime in, which is as it should be: torch's is not there with a CPU build.
    """
    run_nvcc(tools, [
        "-shared", "-Xlinker=--exclude-libs=ALL", *map(str, objects), "-o", str(target),
        f"-L{tools.torch / 'lib'}", "-ltorch_cpu",
    ])  # fmt: skip


def run_nvcc(tools: Toolchain, arguments: Sequence[str]) -> str:
    """Runs nvcc, also for plain C++, which it hands to the host compiler, and returns its output.

    Raises:
        CompileError: It failed; with the command and the end of its output.
    """
    command = [str(tools.nvcc), f"-ccbin={tools.cxx}", f"-Xcompiler={HOST_FLAGS}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return done.stdout


class BuildExtension(build_ext):
    """Builds csrc/ with nvcc and the host compiler, several files at a time."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links the extension; the report of ptxas stays beside the objects."""
        tools = find_toolchain()
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)

        def build(name: str) -> str:
            return compile_one(tools, _ROOT / "csrc" / name, objects / f"{name}.o")

        with ThreadPoolExecutor(tools.jobs) as pool:
            said = list(pool.map(build, sorted(SOURCES, key=lambda name: name.endswith(".cpp"))))
        (objects / REPORT).write_text("".join(said))
        link(tools, [objects / f"{name}.o" for name in SOURCES], target)


def extensions() -> list[Extension]:
    """The extension, or nothing and a sentence that says why.

    Raises:
        SystemExit: HUT_KERNELS_CUDA=1 demands what cannot be built, or the variable is neither 0
            nor 1.
    """
    demand = os.environ.get("HUT_KERNELS_CUDA", "")
    if demand not in ("", "0", "1"):
        sys.exit(f"HUT_KERNELS_CUDA should be 0, 1 or unset; got {demand!r}.")
    if demand == "0":
        return []
    try:
        find_toolchain()
    except Impossible as reason:
        if demand == "1":
            sys.exit(f"HUT_KERNELS_CUDA=1, but the CUDA extension cannot be built: {reason}.")
        if not {"egg_info", "dist_info"} & set(sys.argv):  # pip asks for these first: say it once
            print(f"hut_kernels is built without its CUDA extension: {reason}.", file=sys.stderr)
        return []
    csrc = _ROOT / "csrc"
    return [
        Extension(
            "hut_kernels._C",
            [f"csrc/{name}" for name in SOURCES],
            depends=[f"csrc/{path.name}" for path in sorted(csrc.glob("*.*h"))],
            py_limited_api=True,
            optional=demand != "1",
        )
    ]


def _find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = None if home else shutil.which("nvcc")
    nvcc = Path(found or Path(home or "/usr/local/cuda") / "bin" / "nvcc")
    if nvcc.exists():
        return nvcc
    if home:  # another nvcc than the one that is asked for would be a surprise
        raise Impossible(f"CUDA_HOME is {home}, and {nvcc} does not exist")
    raise Impossible("nvcc is neither on the PATH nor in /usr/local/cuda (CUDA_HOME may name it)")


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not given.isdecimal() or int(given) == 0:
        raise Impossible(f"MAX_JOBS should be a number of compilers; got {given!r}")
    return int(given)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _output(program: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            [str(program), *arguments], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Impossible(f"{program} does not run ({error})") from None


if __name__ == "__main__":
    modules = extensions()
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": BuildExtension},
        # One wheel for every Python from 3.10 on.
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
