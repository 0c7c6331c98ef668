"""`python -m hut_kernels`: what a bug report needs."""

import platform
import subprocess
import sys

import torch

import hut_kernels
from hut_kernels import __main__, backends


def test_the_report_has_versions_devices_and_each_backend_with_its_reason(capsys):
    __main__.main()
    text = capsys.readouterr().out
    assert f"hut_kernels {hut_kernels.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert platform.python_version() in text
    assert torch.cuda.is_available() or "no CUDA device; CPU with" in text
    for name, state in backends().items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"backend {name}"))
        assert (": available" in line) == state["available"]
        assert state["reason"] in line


def test_it_runs_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "hut_kernels"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("hut_kernels ")
    assert found.stderr == ""


def test_the_public_names_exist():
    assert all(hasattr(hut_kernels, name) for name in hut_kernels.__all__)
