"""Hostile and broken input: a clear error or the right answer, and nothing changed."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from hut_kernels import adapter_options, adapter_state_dict, hut_linear, load_adapter, save_adapter
from hut_kernels.adapter_file import _checksum

from .. import fuzz
from .models import WIDTH, block, layer


@pytest.fixture
def model():
    return block()


@pytest.fixture
def file(model, tmp_path):
    save_adapter(model, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def refused(model, file, match=None):
    """The file is refused by both readers, and the model stays as it is."""
    before = contents(model)
    for read in (lambda: load_adapter(model, file), lambda: adapter_options(file)):
        with pytest.raises((ValueError, OSError, TypeError), match=match) as raised:
            read()
        assert len(str(raised.value)) > 10
    assert all(map(torch.equal, contents(model), before))


# A slice of `make fuzz`


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_fuzz(target, tmp_path):
    for number in range(10**6, 10**6 + 250):
        fuzz.run_case(number, tmp_path, (target,))


def test_the_fuzzer_sees_a_wrong_answer_and_a_changed_argument(monkeypatch):
    """A fuzzer that passes everything would pass for a good one."""

    def first_finding(call):
        monkeypatch.setattr(fuzz, "hut_linear", call)
        for number in range(100):
            try:
                fuzz.run_case(number, None, ("hut_linear",))
            except fuzz.Finding as finding:
                return str(finding)
        return None

    def changing(x, weight, *args, **kwargs):
        y = hut_linear(x, weight, *args, **kwargs)
        weight.requires_grad_()
        return y

    assert first_finding(hut_linear) is None
    assert "off by" in first_finding(lambda *a, **k: hut_linear(*a, **k) * 1.1)
    assert "weight has changed" in first_finding(changing)
    assert "no clear error" in first_finding(lambda *a, **k: {}["x"])


def test_the_fuzzer_sees_a_crash_and_a_hang(monkeypatch):
    class Worker:
        def __init__(self, alive):
            self.alive, self.exitcode = alive, -11

        def is_alive(self):
            return self.alive

        def kill(self):
            self.alive = False

        def join(self):
            pass

    class Now:
        value = 7

    class Queue:
        def empty(self):
            return True

    monkeypatch.setattr(fuzz, "SECONDS", 0)
    assert "crash" in fuzz.watch(Worker(False), Now(), Queue(), {}, [])
    assert "hang" in fuzz.watch(Worker(True), Now(), Queue(), {}, [])


# hut_linear


def test_a_huge_rank_is_refused_before_it_costs_anything():
    ones = torch.ones
    A = ones(1).expand(10**9, WIDTH)
    with pytest.raises(ValueError, match="hut_A's r = 1000000000"):
        hut_linear(ones(3, WIDTH), ones(4, WIDTH), A, ones(4, 2))
    B = ones(1).expand(4, 10**9)
    with pytest.raises(ValueError, match="two_sided needs r <= "):
        hut_linear(ones(3, WIDTH), ones(4, WIDTH), A, B, transform="two_sided")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta"])
def test_tensors_that_are_not_dense_are_refused_by_name(name, fused):
    good = {"x": (3, 5), "weight": (4, 5), "hut_A": (2, 5), "hut_B": (4, 2)}
    arguments = {key: torch.ones(shape) for key, shape in good.items()}
    shape = good.get(name, (4,))
    jagged = [torch.ones(2, 5), torch.ones(1, 5)]
    for wrong, word in (
        ([1.0], "list"),
        (torch.ones(shape).numpy(), "ndarray"),
        (torch.ones(shape).to_sparse(), "sparse"),
        (torch.nested.nested_tensor(jagged, layout=torch.jagged), "nested"),
        (torch.nested.nested_tensor(jagged, layout=torch.strided), "nested"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a .*tensor; got .*{word}"):
            hut_linear(**{**arguments, name: wrong}, fused=fused)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["offset", "scaling"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("1", TypeError),
        (None, TypeError),
        (1j, TypeError),
        (torch.tensor(1.0, requires_grad=True), TypeError),  # it would get no gradient
        (10**400, ValueError),
        (1e39, ValueError),
    ],
    ids=repr,
)
def test_a_scalar_outside_float32_is_refused(name, value, error, fused):
    ones = torch.ones
    arguments = (ones(3, 5), ones(4, 5), ones(2, 5), ones(4, 2))
    with pytest.raises(error, match=f"{name} "):
        hut_linear(*arguments, **{name: value}, fused=fused)


def test_memory_that_overlaps_is_read_right():
    """Expanded and self-overlapping arguments are as good as copies of them."""
    memory = torch.randn(64)
    x, weight = memory.as_strided((3, 8), (1, 1)), memory.as_strided((6, 8), (2, 1))
    A, B = memory[:1].expand(2, 8), memory.as_strided((6, 2), (1, 3))
    A, B = A.requires_grad_(), B.requires_grad_()
    copies = [t.detach().clone() for t in (x, weight, A, B)]
    copies[2].requires_grad_(), copies[3].requires_grad_()
    y, expected = hut_linear(x, weight, A, B), hut_linear(*copies)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.sum(), (A, B))
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), copies[2:]))


# load_adapter


def test_no_pickle_is_ever_loaded(model, tmp_path, monkeypatch):
    """Neither by its name nor by its contents does a file get unpickled."""
    canary = tmp_path / "canary"
    bomb = fuzz.Bomb(canary)

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    for name in ("adapter.safetensors", "adapter.bin", "adapter.pt", "adapter.pkl"):
        for write in (
            lambda path: torch.save({"qkv.hut_A": bomb}, path),
            lambda path: torch.save(
                {"qkv.hut_A": bomb}, path, _use_new_zipfile_serialization=False
            ),
            lambda path: path.write_bytes(pickle.dumps(bomb)),
        ):
            write(tmp_path / name)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "load", forbidden)
                patch.setattr(pickle, "load", forbidden)
                patch.setattr(pickle, "loads", forbidden)
                patch.setattr(pickle, "Unpickler", forbidden)
                refused(model, tmp_path / name, "not a safetensors file")
            assert not canary.exists()


def test_every_truncation_is_refused(model, tmp_path):
    model = layer((6, 4), r=1)
    whole = tmp_path / "whole"
    save_adapter(model, whole)
    content = whole.read_bytes()
    for length in range(len(content)):
        part = tmp_path / str(length)
        part.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"truncated|layer options|not a hut_kernels"):
            load_adapter(model, part)


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    """Also those in the factors' own bytes: without a checksum they would train on."""
    model = layer((6, 4), r=1)
    file = tmp_path / "file"
    save_adapter(model, file)
    content, saved = file.read_bytes(), contents(model)
    loaded = 0
    for position in range(len(content)):
        bit = 1 << (position * 7 + position // 8) % 8
        flipped = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
        file.unlink()
        file.write_bytes(flipped)
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        try:
            load_adapter(model, file)
        except ValueError:
            assert not any(p.any() for p in model.parameters())
        else:
            loaded += 1
            factors = adapter_state_dict(model).values()
            assert all(map(torch.equal, factors, (saved[2], saved[3])))
    assert loaded < 8  # a padding space that became another kind of space, at most


def rewritten(model, file, change, **metadata):
    """The adapter with its options changed by `change`, and a checksum that is right again."""
    tensors = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    save_adapter(model, file)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    entry = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    layers = json.loads(entry["layers"])
    change(layers, tensors)
    entry["layers"] = json.dumps(layers)
    entry |= {"sha256": _checksum(entry["layers"], tensors), **metadata}
    file.write_bytes(save(tensors, entry))


LIES = {
    "a rank beyond all memory": lambda layers, _: [o.update(r=10**9) for o in layers.values()],
    "a rank that is a text": lambda layers, _: [o.update(r="3") for o in layers.values()],
    "no rank": lambda layers, _: [o.pop("r") for o in layers.values()],
    "alpha not a number": lambda layers, _: [o.update(alpha="NaN") for o in layers.values()],
    "alpha below 0": lambda layers, _: [o.update(alpha=-1) for o in layers.values()],
    "alpha that is true": lambda layers, _: [o.update(alpha=True) for o in layers.values()],
    "an offset that is true": lambda layers, _: [o.update(offset=True) for o in layers.values()],
    "a dropout that is false": lambda layers, _: [o.update(dropout=False) for o in layers.values()],
    "an unknown transform": lambda layers, _: [o.update(transform="x") for o in layers.values()],
    "a dropout of 1": lambda layers, _: [o.update(dropout=1) for o in layers.values()],
    "gamma that is not there": lambda layers, _: [
        o.update(scale_shift=True) for o in layers.values()
    ],
    "another type": lambda layers, _: [o.update(factor_dtype="float16") for o in layers.values()],
    "a factor missing": lambda _, tensors: tensors.pop("qkv.hut_A"),
    "a factor of one dimension": lambda _, tensors: tensors.update(
        {"qkv.hut_A": torch.ones(3 * WIDTH)}
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_metadata_that_lies_is_refused(model, file, lie):
    rewritten(model, file, lie)
    refused(model, file)


def test_only_a_right_checksum_is_accepted(model, file):
    """Rewriting a file without a change is not refused: the tests above see their change."""
    rewritten(model, file, lambda layers, tensors: None)
    load_adapter(model, file)
    adapter_options(file)
    rewritten(model, file, lambda layers, tensors: None, sha256="0" * 64)
    refused(model, file, "checksum")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, "9" * 10**6, "NaN"])
def test_options_that_would_exhaust_a_parser_are_refused(model, file, text):
    tensors = adapter_state_dict(model)
    metadata = {"format": "hut_kernels", "format_version": "1", "layers": text}
    file.write_bytes(save(tensors, metadata | {"sha256": _checksum(text, tensors)}))
    refused(model, file, "layer options")


def test_names_in_a_file_are_never_paths(model, file, tmp_path):
    """A tensor called ../../x is a name that the model does not have, and no file is written."""
    listing = sorted(tmp_path.rglob("*"))
    for name in ("../../x", "/etc/passwd", "qkv/../hut_A", "__class__", "..", "\0"):
        rewritten(model, file, lambda layers, tensors, n=name: tensors.update({n: torch.ones(1)}))
        before = contents(model)
        with pytest.raises(ValueError, match="only in the file"):
            load_adapter(model, file)
        assert all(map(torch.equal, contents(model), before))
    assert sorted(tmp_path.rglob("*")) == listing


def test_paths_that_lead_to_no_file_are_refused(model, file, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, "", ".", tmp_path / "absent", file / "below", loop, "a\0b", "x" * 5000,
                 None, 3, b"bytes", [], model):  # fmt: skip
        refused(model, path)


def test_a_file_beyond_all_memory_is_refused(model, tmp_path):
    """8 TiB of holes, well formed; where a system maps even that, for what it holds."""
    size = 8 << 40
    header = {
        "__metadata__": {"format": "hut_kernels", "format_version": "1", "layers": "{}"},
        "hole": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    file = tmp_path / "file"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        os.truncate(file, 8 + len(text) + size)
    except OSError:
        pytest.skip("no file of 8 TiB can be made here")
    refused(model, file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_or_a_device_does_not_hang_its_reader(tmp_path):
    """In a process of its own: one that waits in native code can only be killed."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = (
        "import sys, hut_kernels\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        hut_kernels.adapter_options(path)\n"
        "    except ValueError as error:\n"
        "        print('not a file' in str(error))\n"
    )
    paths = [str(pipe), "/dev/zero", "/dev/null"]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert done.stdout.split() == ["True"] * 3


def test_a_link_to_an_adapter_is_an_adapter(model, file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    load_adapter(model, tmp_path / "link")
    assert adapter_options(str(tmp_path / "link"))["r"] == 3
