"""`import hut_kernels` is cheap, touches nothing, and works where little is installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hut_kernels

PACKAGE = Path(hut_kernels.__file__).parent

# Modules that Windows or macOS do not have, or not all of.
ELSEWHERE_ABSENT = (
    "fcntl", "grp", "pwd", "resource", "termios", "pty", "tty", "posix", "nis", "spwd", "crypt",
    "syslog", "ossaudiodev", "triton", "pynvml", "nvidia", "winreg", "msvcrt", "_winapi",
)  # fmt: skip
LIBRARIES = ("peft", "transformers", "accelerate", "datasets")

STEP = """
import torch, hut_kernels
layer = hut_kernels.HUTLinear(6, 4, r=2)
layer(torch.ones(3, 6)).sum().backward()
assert layer.hut_B.grad is not None
"""


def python(code, *arguments):
    """The output of the code in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hidden(names, then):
    """Runs code where the modules, unless PyTorch itself has them already, cannot be imported."""
    return python(
        "import sys, torch, numpy, safetensors.torch, torch._dynamo\n"
        f"for name in {names!r}:\n"
        "    for loaded in [m for m in sys.modules if m.partition('.')[0] == name]:\n"
        "        del sys.modules[loaded]\n"
        "    sys.modules[name] = None\n" + then
    )


def test_the_import_takes_less_than_a_third_of_a_second_beyond_torch():
    code = (
        "import time, torch\n"
        "begun = time.perf_counter()\n"
        "import hut_kernels\n"
        "print(time.perf_counter() - begun)"
    )
    # The fastest of three: what else runs on the machine is not the import's doing.
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_the_import_touches_no_triton_no_library_and_no_compiler():
    code = (
        "import sys, subprocess, os, torch\n"
        "def refuse(*args, **kwargs): raise AssertionError(f'a process was started: {args}')\n"
        "subprocess.Popen.__init__ = os.system = os.posix_spawn = refuse\n"
        "before = set(sys.modules)\n"
        "import hut_kernels\n"
        "print(*(set(sys.modules) - before))"
    )
    loaded = {name.partition(".")[0] for name in python(code).split()}
    assert loaded.isdisjoint({"triton", "distutils", "setuptools", "ninja", *LIBRARIES}), loaded


def test_a_step_on_the_cpu_touches_no_triton():
    code = STEP + "import sys\nassert 'triton' not in sys.modules"
    python(code)


def test_it_works_without_triton():
    hidden(
        ("triton",),
        STEP + "found = hut_kernels.backends()['triton']\n"
        "assert not found['available'], found\n"
        "assert 'installed' in found['reason'], found\n"
        "try:\n"
        "    hut_kernels.hut_linear(*[torch.ones(2, 2)] * 4, backend='triton')\n"
        "except hut_kernels.HUTBackendError as error:\n"
        "    assert 'triton is not installed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n",
    )


def test_it_works_without_linux_only_modules(tmp_path):
    """A step, an adapter saved and loaded, `python -m hut_kernels`."""
    hidden(
        (*ELSEWHERE_ABSENT, *LIBRARIES),
        STEP + "import runpy\n"
        f"hut_kernels.save_adapter(layer, {str(tmp_path / 'a')!r})\n"
        f"hut_kernels.load_adapter(layer, {str(tmp_path / 'a')!r})\n"
        "runpy.run_module('hut_kernels', run_name='__main__')\n",
    )


def top_level_imports(file):
    """The modules that importing a file imports."""
    found = set()
    pending = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize(
    "file",
    [
        file.relative_to(PACKAGE).as_posix()
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in ("triton", "integrations")
    ],
)
def test_no_module_needs_linux_or_a_library_at_its_top_level(file):
    assert top_level_imports(PACKAGE / file).isdisjoint((*ELSEWHERE_ABSENT, *LIBRARIES))


def test_only_its_own_integration_needs_a_library():
    for file in (PACKAGE / "integrations").rglob("*.py"):
        own = file.relative_to(PACKAGE / "integrations").parts[0]
        allowed = {own, "transformers"}  # peft itself is built on transformers
        assert top_level_imports(file) & {"triton", *LIBRARIES} <= allowed, file
