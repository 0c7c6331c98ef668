"""Helpers of the tests of csrc/: the build's own functions, and its kernels on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Aliasing: the kernels read floats as float4, which nvcc allows and a host compiler may not see.
_FLAGS = ("-Xcompiler=-O1,-fno-strict-aliasing", f"-I{ROOT / 'csrc'}")


def setup_module() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("hut_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hut_setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def missing() -> str | None:
    """The reason why csrc/ cannot be compiled here, or None."""
    module = setup_module()
    try:
        module.find_toolchain()
    except module.Impossible as reason:
        return str(reason)
    return None


def build_emulation(folder: Path) -> Path:
    """The operators `torch.ops.hut_emulated` for CPU tensors, as a shared library."""
    setup = setup_module()
    tools = setup.find_toolchain()
    # The real extension may be loaded beside it, so the operators need another name; a macro would
    # not do, for torch 2.10 spells the name of a library out before it looks for one.
    renamed = folder / "ops.cpp"
    renamed.write_text((ROOT / "csrc" / "ops.cpp").read_text().replace("hut_cuda", "hut_emulated"))
    sources = [HERE / "emulated.cpp", renamed, ROOT / "csrc" / "runtime.cpp"]
    objects = [folder / f"{source.name}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        setup.compile_one(tools, source, target, _FLAGS)
    setup.link(tools, objects, folder / "emulated.so")
    return folder / "emulated.so"


def build_check(folder: Path) -> Path:
    """The program of check.cpp."""
    setup = setup_module()
    tools = setup.find_toolchain()
    setup.compile_one(tools, HERE / "check.cpp", folder / "check.o", _FLAGS)
    setup.run_nvcc(tools, [str(folder / "check.o"), "-o", str(folder / "check")])
    return folder / "check"
