"""The extension's build: a sentence where it cannot be, and the machine code where it can."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import csrc

setup = csrc.setup_module()
SUPPORTED = ["75", "80", "86", "89", "90", "100", "120"]
CHECKED = ("80", "90", "120")
OCCUPANCY = 3  # blocks of 128 threads on a multiprocessor: csrc/device.cuh
_MISSING = csrc.missing()
compiled = pytest.mark.skipif(_MISSING is not None, reason=f"csrc/ is not compiled: {_MISSING}")


# Which architectures


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, ("80", "86", "89", "90", "100", "120+PTX")),
        ("8.0", ("80",)),
        ("8.0;9.0+PTX", ("80", "90+PTX")),
        ("7.5 8.0, 8.9", ("80", "89")),
        ("9.0a", ("90a",)),
        (";8.0; 9.0 ;", ("80", "90")),
    ],
)
def test_architectures(wanted, chosen):
    assert setup.choose_architectures(wanted, SUPPORTED) == chosen


def test_an_older_nvcc_builds_what_it_knows_and_ptx_for_the_rest():
    assert setup.choose_architectures(None, ["80", "86", "90"]) == ("80", "86", "90+PTX")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("Hopper", "should look like"),
        ("8.7", "nvcc does not know 8.7"),
        ("7.0;7.5", "no architecture from 8.0"),
        (";", "no architecture from 8.0"),
    ],
)
def test_architectures_that_cannot_be(wanted, message):
    with pytest.raises(setup.Impossible, match=message):
        setup.choose_architectures(wanted, SUPPORTED)


def test_flags_of_the_architectures():
    assert setup.generate_code(("80", "120+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# Where it cannot be built


def fake_nvcc(folder: Path, says: str) -> None:
    (folder / "bin").mkdir()
    program = folder / "bin" / "nvcc"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is for Linux")
@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (None, "bin/nvcc does not exist"),
        ("echo Cuda compilation tools, release 11.8, V11.8.89", "nvcc 11.8 is too old"),
        ("echo nonsense", "nvcc of an unknown release is too old"),
        ("exit 3", "does not run"),
    ],
)
@pytest.mark.parametrize("demand", ["", "0", "1"])
def test_a_build_without_nvcc_ends_in_a_sentence(tmp_path, says, reason, demand):
    if says is not None:
        fake_nvcc(tmp_path, says)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "HUT_KERNELS_CUDA": demand}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=csrc.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CUDA extension" in line]
    assert "Traceback" not in done.stderr
    assert (done.returncode != 0) == (demand == "1")
    if demand == "0":
        assert said == []
    else:
        (sentence,) = said
        assert reason in sentence


def build(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=csrc.ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("demand", ["yes", "2", "01"])
def test_a_demand_must_be_yes_or_no(demand):
    done = build(HUT_KERNELS_CUDA=demand)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        f"HUT_KERNELS_CUDA should be 0, 1 or unset; got {demand!r}."
    ]


@compiled
@pytest.mark.parametrize("jobs", ["abc", "0", "-1", "1.5"])
def test_an_invalid_number_of_jobs_is_refused(jobs):
    done = build(HUT_KERNELS_CUDA="1", MAX_JOBS=jobs)
    assert done.returncode != 0
    (sentence,) = done.stderr.splitlines()
    assert f"MAX_JOBS should be a number of compilers; got {jobs!r}" in sentence


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is for Linux")
def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    fake_nvcc(tmp_path, "")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup._find_nvcc() == tmp_path / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup._find_nvcc() == tmp_path / "bin" / "nvcc"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(setup.Path, "exists", lambda path: False)
    with pytest.raises(setup.Impossible, match="neither on the PATH nor in /usr/local/cuda"):
        setup._find_nvcc()


def test_a_build_without_torch_ends_in_a_sentence(monkeypatch, capsys):
    """The state of `pip install .`: its isolated build sees no PyTorch."""
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.sys, "platform", "linux")
    monkeypatch.delenv("HUT_KERNELS_CUDA", raising=False)
    assert setup.extensions() == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "PyTorch is not installed where the build runs" in line


# What is built


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The extension and ptxas' report: those of `make ext` where they are new, else of a build."""
    made, report = csrc.ROOT / "hut_kernels" / "_C.abi3.so", csrc.ROOT / "build" / "ext"
    if made.exists() and (report / setup.REPORT).exists():
        newest = max(path.stat().st_mtime for path in (csrc.ROOT / "csrc").iterdir())
        text = (report / setup.REPORT).read_text()
        if made.stat().st_mtime > newest and all(f"sm_{arch}'" in text for arch in CHECKED):
            return made, text
    folder = tmp_path_factory.mktemp("extension")
    done = subprocess.run(
        [
            sys.executable, "setup.py", "-q", "build_ext",
            "--build-lib", folder / "lib", "--build-temp", folder / "temp",
        ],
        cwd=csrc.ROOT, capture_output=True, text=True,
        env={
            **os.environ, "HUT_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0;12.0+PTX",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = folder / "lib" / "hut_kernels" / "_C.abi3.so"
    return made, (folder / "temp" / setup.REPORT).read_text()


def kernels(report: str) -> dict[tuple[str, str], str]:
    """The report of ptxas on each kernel, by its name and architecture."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", report)
    return {(parts[i], parts[i + 1]): parts[i + 2] for i in range(1, len(parts), 3)}


@compiled
@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first of them builds: 75 s of one core
def test_no_kernel_spills_and_all_reach_the_occupancy(built):
    found = kernels(built[1])
    for arch in CHECKED:
        names = [name for name, of in found if of == arch]
        assert sum("hut_weight" in name for name in names) == 24
        assert sum("hut_reduce" in name for name in names) == 15
        assert sum("hut_finish" in name for name in names) == 1
    for kernel, text in found.items():
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        assert numbers.groups() == ("0", "0", "0"), kernel
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        assert registers <= 65536 // (128 * OCCUPANCY) // 8 * 8, (kernel, registers)


def disassemble(library: Path, arch: str) -> dict[str, str]:
    """The machine code of each kernel by its name."""
    triton = pytest.importorskip("triton", reason="the disassembler is in Triton's package")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    text = subprocess.run(
        [tools / "cuobjdump", "-sass", "-arch", f"sm_{arch}", library],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    parts = re.split(r"Function : (\w+)", text)
    return {parts[i]: parts[i + 1] for i in range(1, len(parts), 2)}


@compiled
@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first of them builds: 75 s of one core
@pytest.mark.parametrize("arch", CHECKED)
def test_sixteen_bytes_at_a_time_and_tensor_cores(built, arch):
    code = disassemble(built[0], arch)
    weight = {name: text for name, text in code.items() if "hut_weight" in name}
    assert len(weight) == 24
    for name, text in weight.items():
        wide = re.search(r"WeightInstanceIf", name) is not None  # W0 is float32
        assert len(re.findall(r"LDG\.E\.128", text)) >= (8 if wide else 4), name
        assert len(re.findall(r"STG\.E\.128", text)) >= 4, name
    for name, text in code.items():
        if "hut_reduce" in name:
            assert len(re.findall(r"LDG\.E\.128", text)) >= 12, name
        if "hut_finish" not in name:
            flags = re.search(r"Lb([01])ELb([01])", name)  # two_sided, exact
            assert ("HMMA.1688.F32.TF32" in text) == (flags.groups() == ("0", "0")), name


@compiled
@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first of them builds: 75 s of one core
def test_it_depends_only_on_stable_interfaces(built):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm, of binutils, is not installed")
    text = subprocess.run(
        [nm, "-D", "--undefined-only", built[0]], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split()[-1].split("@")[0] for line in text.splitlines()]
    assert any(name == "torch_call_dispatcher" for name in needed)
    assert not [name for name in needed if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert not [name for name in needed if "cuda" in name and "aoti_torch_device_type" not in name]


@compiled
@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first of them builds: 75 s of one core
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_it_imports_without_a_gpu_and_says_so(built, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(csrc.ROOT / "hut_kernels", tmp_path / "hut_kernels", ignore=ignored)
    shutil.copy(built[0], tmp_path / "hut_kernels")

    def python(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    report = python("-m", "hut_kernels")
    assert re.search(
        r"backend cuda: not available \(the compiled extension is loaded, for [\d +PTX]+, "
        r"but no CUDA device found\)",
        report,
    )
    python(
        "-c",
        "import torch, pytest, hut_kernels\n"
        "from hut_kernels import cuda\n"
        "assert hut_kernels.__file__.startswith('" + str(tmp_path) + "')\n"
        "assert hut_kernels.dispatch._extension().toolkit >= 12000\n"
        "W0, A, B = torch.ones(5, 6), torch.ones(2, 6), torch.ones(5, 2)\n"
        "with pytest.raises(RuntimeError, match='weight must be on a CUDA device'):\n"
        "    torch.ops.hut_cuda.weight(W0, A, B, None, False, 1.0, 1.0, torch.float32)\n"
        "with pytest.raises(hut_kernels.HUTBackendError, match='needs a CUDA device'):\n"
        "    hut_kernels.hut_linear(torch.ones(3, 6), W0, A, B, backend='cuda')\n"
        "assert hut_kernels.hut_linear(torch.ones(3, 6), W0, A, B).shape == (3, 5)\n",
    )


@pytest.mark.parametrize(
    ("compiled_for", "capability", "runs"),
    [
        ("80 90", (8, 0), True),
        ("80 90", (8, 9), True),
        ("86 90", (8, 0), False),
        ("80 90", (10, 0), False),
        ("80 90+PTX", (12, 1), True),
        ("120+PTX", (9, 0), False),
        ("90a", (9, 0), True),
        ("100a", (10, 3), False),
        ("100a+PTX", (10, 3), False),
        ("100a+PTX", (12, 0), False),
        ("100f", (10, 3), True),
        ("100f+PTX", (12, 0), False),
        ("103f", (10, 0), False),
        ("100a 120", (12, 1), True),
    ],
)
def test_which_devices_a_build_covers(compiled_for, capability, runs):
    from hut_kernels import dispatch

    assert dispatch.covers(compiled_for, capability) is runs


@pytest.mark.parametrize(
    ("driver", "toolkit", "runs"),
    [(13000, 13000, True), (12080, 13000, False), (13010, 12080, True), (12020, 12080, True)],
)
def test_a_driver_of_an_older_major_version_is_named(driver, toolkit, runs, monkeypatch):
    from hut_kernels import dispatch

    made = SimpleNamespace(architectures="90", toolkit=toolkit)
    monkeypatch.setattr(dispatch, "_extension", lambda: made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    reason = dispatch._device_uncovered.__wrapped__(0)
    assert (reason is None) if runs else ("built by CUDA 13.0" in reason and "CUDA 12.8" in reason)
