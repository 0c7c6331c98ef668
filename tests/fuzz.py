"""Arguments and adapter files that no one would write: is each refused in words, or served right?

`python -m tests.fuzz [--cases 20000] [--first 0] [--target NAME]` makes case after case from its
number alone, half of them for `hut_linear` and half for `load_adapter`. A case passes if it ends
in a clear Python error, or in the right answer, and nothing that was given has changed. The cases
run in a process of their own: one that crashes or hangs it is named too. The exit status is 1 on a
finding, which `--first NUMBER --cases 1` repeats.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from hut_kernels import (
    HUTBackendError,
    adapter_options,
    hut_linear,
    inject,
    load_adapter,
    save_adapter,
)
from hut_kernels.adapter_file import _checksum
from hut_kernels.layer import FLOATS

from .references import TRAINABLE, Case, lay, limit, make

SECONDS = 60  # after which a case hangs
CLEAR = (ValueError, TypeError, HUTBackendError)
# PyTorch's own rule for every layer, in its own words: they say what to do instead.
RULES = ("Inference tensors cannot be saved for backward",)


class Finding(Exception):
    """A behavior that no case may show."""


def check_clear(raised: Exception, also: tuple[type[Exception], ...] = ()) -> str:
    """The kind of an error that says what was wrong with what was given."""
    if str(raised).startswith(RULES):
        return type(raised).__name__
    if not isinstance(raised, (*CLEAR, *also)):
        raise Finding(f"{type(raised).__name__} is no clear error: {raised}") from raised
    if len(str(raised)) < 10 or "nternal error" in str(raised):
        raise Finding(f"{type(raised).__name__} says nothing: {raised}") from raised
    return type(raised).__name__


# hut_linear

NAMES = ("x", "weight", "hut_A", "hut_B", "bias", "gamma", "beta")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
FOREIGN = (
    torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def fuzz_hut_linear(rng: random.Random) -> str:
    """One call: valid arguments, of which some are then spoilt."""
    case = valid_case(rng)
    arguments: dict[str, Any] = {name: getattr(case, name) for name in NAMES}
    arguments |= {k: v for k, v in case.options.items() if k not in arguments}
    arguments["fused"] = rng.random() < 0.8
    if rng.random() < 0.1:
        arguments["backend"] = "torch"
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])):
        spoil(rng, arguments)
    for name in TRAINABLE:
        value = arguments[name]
        if trainable(value) and rng.random() < 0.5:
            arguments[name] = value.detach().requires_grad_()
    before = {name: footprint(value) for name, value in arguments.items()}
    autocast = rng.random() < 0.1
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = hut_linear(**arguments)
        outcome = check_answer(arguments, y, rng, autocast)
    except Exception as raised:
        if isinstance(raised, Finding):
            raise
        outcome = check_clear(raised)
    for name, value in arguments.items():
        if before[name] != footprint(value):
            raise Finding(f"{name} has changed")
    return outcome


def is_plain(value: Any) -> bool:
    """A tensor that can be changed further."""
    return (
        isinstance(value, Tensor)
        and value.dtype in FLOATS
        and value.layout is torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta)
    )


def trainable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_inference()


def valid_case(rng: random.Random) -> Case:
    def size() -> int:
        return rng.choice([0, 1, 1, 2, 3, 5, 16, 17, 33])

    K, O = size(), size()
    leading = rng.choice([(size(),), (size(),), (), (2, size()), (1, 3, size())])
    options: dict[str, Any] = {"precision": rng.choice(["merged", "merged", "split"])}
    r = rng.choice([1, 2, 3, 7, 17, 130])
    if min(K, O) >= r and rng.random() < 0.5:
        options["transform"] = "two_sided"
    else:
        options["offset"] = rng.choice([1.0, 1.0, 0.0, 0.5, -2.0, 1, 3])
        options["scaling"] = rng.choice([1.0, 1.0, 0.25, 0.0, -3.0, 2])
    return make(
        leading, K, O, r,
        dtype=rng.choice(DTYPES),
        weight_dtype=rng.choice(DTYPES),
        factor_dtype=rng.choice(DTYPES),
        vectors=" ".join(v for v in ("bias", "gamma", "beta") if rng.random() < 0.4),
        seed=rng.randrange(2**31),
        **options,
    )  # fmt: skip


def spoil(rng: random.Random, arguments: dict[str, Any]) -> None:
    """Changes one argument: harmlessly (strides, values), or so that it must be refused."""
    if rng.random() < 0.2:
        name = rng.choice(["transform", "precision", "offset", "scaling", "backend"])
        arguments[name] = rng.choice(
            [None, "", "LOW_RANK", "two_sided", "low_rank", "split", "cuda", "triton", 0, 1.5, -1,
             math.nan, math.inf, 1e300, 10**400, 1j, [], (1.0,), b"auto", object, True,
             torch.tensor(1.0)]
        )  # fmt: skip
        return
    name = rng.choice(NAMES)
    value = arguments[name]
    if is_plain(value):
        arguments[name] = rng.choice(CHANGES)(rng, value)
    else:
        arguments[name] = rng.choice([None, 1.0, torch.ones(rng.choice([0, 1, 17]))])


def reshaped(rng: random.Random, tensor: Tensor) -> Tensor:
    change = rng.randrange(6)
    if change == 0:
        return tensor.unsqueeze(rng.randrange(tensor.ndim + 1))
    if change == 1:
        return tensor.flatten()
    if change == 2:
        return tensor.mT if tensor.ndim > 1 else tensor[None]
    if change == 3:
        return tensor.new_ones(())
    wanted = list(tensor.shape)
    if wanted:
        at = rng.randrange(len(wanted))
        wanted[at] = rng.choice([0, 1, wanted[at] + 1, max(0, wanted[at] - 1), 2 * wanted[at]])
    return tensor.new_ones(wanted)


def restrided(rng: random.Random, tensor: Tensor) -> Tensor:
    return lay(tensor, rng.choice(["transposed", "sliced", "offset"]))


def overlapping(rng: random.Random, tensor: Tensor) -> Tensor:
    """Rows that share their memory: all of one, or each shifted by one element."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return tensor
    if rng.random() < 0.5:
        return tensor[:1].expand_as(tensor)
    memory = tensor.new_ones(sum(tensor.shape))
    return memory.as_strided(tensor.shape, [1] * tensor.ndim)


def special(rng: random.Random, tensor: Tensor) -> Tensor:
    """Values at and beyond the edges of the type."""
    changed = tensor.detach().clone()
    if changed.numel():
        value = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40])
        changed = changed.contiguous()
        changed.view(-1)[rng.randrange(changed.numel())] = value
    return changed


def huge_rank(rng: random.Random, tensor: Tensor) -> Tensor:
    """Very many rows or columns without memory of their own."""
    many = 20_000
    shape = (many, *tensor.shape[1:]) if rng.random() < 0.5 else (*tensor.shape[:1], many)
    return tensor.new_ones(1).expand(shape)


def foreign_layout(rng: random.Random, tensor: Tensor) -> Any:
    change = rng.randrange(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if change == 0 and tensor.ndim:
            return tensor.float().to_sparse()
        if change == 1 and tensor.ndim == 2:
            return tensor.float().to_sparse_csr()
        if change == 2 and tensor.ndim == 2 and 0 not in tensor.shape:
            return torch.nested.nested_tensor(list(tensor))
        if change == 3:
            return torch.complex(tensor.float(), tensor.float()).conj().imag  # lazily negated
        if change == 4 and tensor.ndim == 2 and tensor.numel():
            return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
        return tensor.to("meta")


def not_a_tensor(rng: random.Random, tensor: Tensor) -> Any:
    return rng.choice(
        [None, 0, 1.5, "x", [1.0], (), {}, object(), torch.Tensor, tensor.shape, [[1.0]],
         np.ones(tensor.shape[:1]), nn.Linear(2, 2), torch.float32]
    )  # fmt: skip


def other_kind(rng: random.Random, tensor: Tensor) -> Tensor:
    """A parameter, an inference tensor, one that requires grad."""
    change = rng.randrange(3)
    if change == 0:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    if change == 1:
        with torch.inference_mode():
            return tensor.clone()
    return tensor.detach().requires_grad_() if trainable(tensor) else tensor.clone()


CHANGES = (
    reshaped,
    restrided,
    restrided,
    overlapping,
    special,
    huge_rank,
    foreign_layout,
    not_a_tensor,
    other_kind,
    lambda rng, tensor: tensor.to(rng.choice(DTYPES)),
    lambda rng, tensor: tensor.double().clamp(0, 1).to(rng.choice(FOREIGN)),
)


def footprint(value: Any) -> Any:
    """All of a tensor that a call must leave as it is."""
    if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.is_nested:
        return id(value)
    if value.layout is not torch.strided or value.numel() > 10**6:
        return id(value)
    version = None if value.is_inference() else value._version
    content = value.detach().resolve_neg().resolve_conj()
    content = content.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    state = (value.shape, value.stride(), value.dtype, value.requires_grad, version)
    return (id(value), *state, content.numpy().tobytes())


def check_answer(arguments: dict[str, Any], y: Tensor, rng: random.Random, autocast: bool) -> str:
    """The output and each gradient against float64, where the arguments are finite."""
    x, weight = arguments["x"], arguments["weight"]
    dtype = torch.bfloat16 if autocast and x.dtype != torch.float64 else x.dtype
    if y.shape != (*x.shape[:-1], len(weight)) or y.dtype != dtype:
        raise Finding(f"y is {y.dtype} {tuple(y.shape)}")
    if x.is_meta or not all(map(math.isfinite, (arguments["offset"], arguments["scaling"]))):
        return "right kind"
    case = as_case(arguments, y, rng, dtype)
    with np.errstate(all="ignore"):
        expected, size = case.expected(), absolute(case).expected()
    results = {"y": y}
    leaves = [n for n in TRAINABLE if arguments[n] is not None and arguments[n].requires_grad]
    if leaves and y.requires_grad:
        given = [arguments[name] for name in leaves]
        found = torch.autograd.grad(y, given, case.grad)
        results |= dict(zip(leaves, found, strict=True))
    elif leaves:
        raise Finding(f"{leaves} require grad, but y does not")
    # NaN or Inf that were given come out as they do of any layer: somewhere.
    finite = all(bool(getattr(case, n).isfinite().all()) for n in NAMES if arguments[n] is not None)
    for name, out in results.items() if finite else ():
        compare(name, out, expected[name], size[name], dtype, case.longest)
    return "right"


def as_case(arguments: dict[str, Any], y: Tensor, rng: random.Random, dtype: torch.dtype) -> Case:
    tensors = {n: None if arguments[n] is None else arguments[n].detach() for n in NAMES}
    grad = torch.rand(y.shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
    options = {n: arguments[n] for n in ("transform", "offset", "scaling", "precision")}
    tensors["x"] = tensors["x"].to(dtype)
    return Case(**tensors, grad=grad.to(dtype), **options)


def absolute(case: Case) -> Case:
    """Every term of every sum without its sign: what rounding errors are relative to.

    `split` adds the products with W0 and with `W0 * (T - 1)`.
    """
    tensors = {n: value.abs() for n in (*NAMES, "grad") if (value := getattr(case, n)) is not None}
    offset = abs(case.offset) + (2 if case.precision == "split" else 0)
    return case.replace(**tensors, offset=offset, scaling=abs(case.scaling))


def compare(
    name: str, out: Tensor, expected: Any, size: Any, dtype: torch.dtype, longest: int
) -> None:
    if tuple(out.shape) != expected.shape:
        raise Finding(f"{name} has shape {tuple(out.shape)}, not {expected.shape}")
    largest = min(torch.finfo(dtype).max, torch.finfo(out.dtype).max)
    if not math.isfinite(size.sum()) or size.max(initial=0.0) > largest / 8:
        return  # the type's range is left
    values = out.detach().double().numpy()
    norm = math.sqrt((size**2).sum())
    distance = math.sqrt(((values - expected) ** 2).sum())
    # Each of the half-precision roundings on the way may be at its worst in a result of few
    # elements; the limit of the definition is for norms of many.
    allowed = 4 * limit(dtype, longest, out.dtype) * norm
    if not distance <= allowed + 1e-6:
        raise Finding(f"{name} is off by {distance:.3g}, {allowed:.3g} allowed, of {norm:.3g}")


# load_adapter


class Model(nn.Module):
    """Two layers of different shapes, each with its own kind of adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 5)


class World:
    """A folder, a model in it, and the bytes of an adapter that fits."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = Model()
        inject(self.model, ["first"], r=2, alpha=3)
        inject(self.model, ["second"], r=3, transform="two_sided", scale_shift=True)
        self.randomise()
        self.path = folder / "adapter.safetensors"
        save_adapter(self.model, self.path)
        self.bytes = self.path.read_bytes()
        self.saved = {n: p.detach().clone() for n, p in self.factors().items()}
        length = int.from_bytes(self.bytes[:8], "little")
        self.header = json.loads(self.bytes[8 : 8 + length])
        self.canary = folder / "canary"

    def factors(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def randomise(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_()

    def state(self) -> dict[str, bytes]:
        return {n: p.detach().numpy().tobytes() for n, p in self.model.state_dict().items()}


def fuzz_load_adapter(rng: random.Random, world: World) -> str:
    """One file: an adapter damaged, rewritten to lie, or something else entirely."""
    file = rng.choice(FILES)(rng, world)
    world.randomise()
    before = world.state()
    outcome = load(world, file, before)
    try:
        options = adapter_options(file)
    except Exception as raised:
        check_clear(raised, also=(OSError,))
    else:
        # Whatever a file says, a layer can be made of it, and is no larger than the file.
        inject(Model(), ["first"], **options)
    if world.canary.exists():
        raise Finding("code from a file was run")
    return outcome


def load(world: World, file: Any, before: dict[str, bytes]) -> str:
    try:
        load_adapter(world.model, file)
    except Exception as raised:
        outcome = check_clear(raised, also=(OSError,))
        if world.state() != before:
            raise Finding("the model has changed under an error") from raised
        return outcome
    for name, value in world.factors().items():
        if not torch.equal(value, world.saved[name]):
            raise Finding(f"{name} was loaded wrong")
    return "right"


def written(world: World, content: bytes) -> Path:
    # A new file each time: what has been mapped into memory must not shrink.
    world.path.unlink(missing_ok=True)
    world.path.write_bytes(content)
    return world.path


def truncated(rng: random.Random, world: World) -> Path:
    return written(world, world.bytes[: rng.randrange(len(world.bytes))])


def flipped(rng: random.Random, world: World) -> Path:
    content = bytearray(world.bytes)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 100])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return written(world, bytes(content))


def spliced(rng: random.Random, world: World) -> Path:
    """A piece of the file removed, doubled, overwritten or moved."""
    content = world.bytes
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    piece = content[a:b]
    at = rng.randrange(len(content))
    return written(
        world,
        rng.choice(
            [
                content[:a] + content[b:],
                content[:at] + piece + content[at:],
                content[:a] + bytes(b - a) + content[b:],
                content + piece,
                content[:a] + rng.randbytes(b - a) + content[b:],
            ]
        ),
    )


def lying_header(rng: random.Random, world: World) -> Path:
    """Types, shapes and offsets that are not those of the data."""
    header = json.loads(json.dumps(world.header))
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        key = rng.choice(["dtype", "shape", "data_offsets", "name"])
        if key == "dtype":
            entry[key] = rng.choice(["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "", 3])
        elif key == "name":
            new = rng.choice(["../../x", "/etc/passwd", "", "\0", name.upper(), "first.hut_A"])
            header[new] = header.pop(name)
        else:
            numbers = [0, 1, -1, 2, 24, 10**6, 2**31, 2**63, 2**64, 10**30, 1.5, None, "8", []]
            entry[key] = [rng.choice(numbers) for _ in range(rng.choice([0, 1, 2, 2, 2, 3]))]
    text = json.dumps(header).encode()
    length = len(text) + rng.choice([0, 0, 0, 0, 1, -1, 2**40])
    body = world.bytes[8 + int.from_bytes(world.bytes[:8], "little") :]
    return written(world, (length % 2**64).to_bytes(8, "little") + text + body)


def lying_metadata(rng: random.Random, world: World) -> Path:
    """Options and tensors that are no adapter's, or another's, under a right checksum."""
    metadata = dict(world.header["__metadata__"])
    tensors = {name: value.clone() for name, value in world.saved.items()}
    layers = json.loads(metadata["layers"])
    for _ in range(rng.choice([1, 1, 2])):
        layer = rng.choice(list(layers))
        change = rng.randrange(8)
        values = [None, True, 0, 1, 2, 3, -1, 10**9, 10**30, 1.5, math.nan, math.inf, "", "2",
                  "float16", "two_sided", "low_rank", "split", [], {}, [2]]  # fmt: skip
        if change <= 3 and isinstance(layers[layer], dict) and layers[layer]:
            layers[layer][rng.choice(list(layers[layer]))] = rng.choice(values)
        elif change == 4:
            layers[layer] = rng.choice(values)
        elif change == 5:
            layers[rng.choice(["third", "", "first.", "../first"])] = layers.pop(layer)
            if not layers:
                break
        elif change == 6:
            name = rng.choice(list(tensors))
            shapes = [(0,), (), (2, 6), (3, 4), (10**5,), (2, 0)]
            tensors[name] = torch.ones(rng.choice(shapes), dtype=rng.choice(DTYPES))
        else:
            tensors[rng.choice(["first.hut_A", "first.gamma", "x", "second"])] = torch.ones(3)
    metadata["layers"] = json.dumps(layers)
    if rng.random() < 0.1:
        metadata["layers"] = rng.choice(
            ["", "null", "[]", "1", "[" * 10**5, '{"a":' * 10**5, "9" * 10**5, "{}", "NaN"]
        )
    if rng.random() < 0.1:
        key = rng.choice(["format", "format_version", "sha256"])
        metadata[key] = rng.choice(["", "pt", "0", "1", "hut_kernels", "\0", "1.0"])
    else:
        metadata["sha256"] = _checksum(metadata["layers"], tensors)
    if rng.random() < 0.1:
        metadata.pop(rng.choice(list(metadata)))
    path = written(world, save(tensors, metadata))
    # A lie that happens to be the truth is no lie: such a file holds what the model has to get.
    world.saved = tensors if tensors.keys() == world.saved.keys() else world.saved
    return path


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def foreign(rng: random.Random, world: World) -> Path:
    """Another format under an adapter's name."""
    kind = rng.randrange(8)
    if kind == 0:
        torch.save({"first.hut_A": Bomb(world.canary)}, world.path)
    elif kind == 1:
        torch.save(world.saved, world.path, _use_new_zipfile_serialization=rng.random() < 0.5)
    elif kind == 2:
        import pickle

        return written(world, pickle.dumps(Bomb(world.canary), protocol=rng.randrange(6)))
    elif kind == 3:
        with zipfile.ZipFile(world.path, "w") as archive:
            archive.writestr("../../canary", "x")
    elif kind == 4:
        return written(world, rng.randbytes(rng.choice([0, 1, 7, 8, 9, 1000])))
    elif kind == 5:
        return written(world, b"GGUF" + rng.randbytes(100))
    elif kind == 6:
        return written(world, save({"lora_A": torch.ones(2)}, {"format": "pt"}))
    else:
        return written(world, json.dumps(world.header).encode())
    return world.path


def odd_path(rng: random.Random, world: World) -> Any:
    """Paths that are not files."""
    folder = world.folder
    pipe, loop, link = folder / "pipe", folder / "loop", folder / "link"
    if hasattr(os, "mkfifo") and not pipe.exists():
        os.mkfifo(pipe)
    if not loop.is_symlink():
        loop.symlink_to(loop)
        link.symlink_to(folder)
    return rng.choice(
        [folder, str(folder) + os.sep, link, pipe, loop, "", ".", "..", "\0", "a\0b", "x" * 5000,
         folder / "absent", folder / "../absent", "/dev/zero", "/dev/null", "/dev/stdin", None, 0,
         -1, 3.5, b"bytes", [], world.model, "file:///etc/passwd", "~", "C:\\x", "\udcff"]
    )  # fmt: skip


def valid(rng: random.Random, world: World) -> Any:
    path = written(world, world.bytes)
    return rng.choice([path, str(path)])


FILES = (truncated, flipped, flipped, spliced, lying_header, lying_header, lying_metadata,
         lying_metadata, foreign, odd_path, valid)  # fmt: skip


# Running


TARGETS = ("hut_linear", "load_adapter")


def run_case(number: int, folder: Path, targets: tuple[str, ...] = TARGETS) -> tuple[str, str]:
    """The target of a case, and how it ended.

    Raises:
        Finding: It did what it must not do.
    """
    rng = random.Random(number)
    target = targets[number % len(targets)]
    if target == "hut_linear":
        return target, fuzz_hut_linear(rng)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        return target, fuzz_load_adapter(rng, World(Path(own)))


def work(numbers: range, targets: tuple[str, ...], now: Any, queue: Any) -> None:
    """Runs cases, writing down the number of each before it begins."""
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            now.value = number
            try:
                queue.put((number, *run_case(number, Path(folder), targets)))
            except Finding as finding:
                queue.put((number, "FINDING", str(finding)))
            except Exception as raised:
                queue.put((number, "FINDING", f"the fuzzer: {type(raised).__name__}: {raised}"))
    now.value = numbers.stop


def fuzz(numbers: range, targets: tuple[str, ...] = TARGETS) -> tuple[collections.Counter, list]:
    """The count of each ending, and the findings: `(number, what)`."""
    outcomes: collections.Counter = collections.Counter()
    findings: list[tuple[int, str]] = []
    context = multiprocessing.get_context("spawn")
    first = numbers.start
    while first < numbers.stop:
        now, queue = context.Value(ctypes.c_longlong, first), context.Queue()
        arguments = (range(first, numbers.stop), targets, now, queue)
        worker = context.Process(target=work, args=arguments, daemon=True)
        worker.start()
        fate = watch(worker, now, queue, outcomes, findings)
        if fate is None:
            break
        findings.append((now.value, fate))
        first = now.value + 1
    return outcomes, findings


def watch(worker: Any, now: Any, queue: Any, outcomes: Any, findings: Any) -> str | None:
    """Collects a worker's results; how it died, if it did before its last case."""
    seen, since = now.value, time.monotonic()
    while True:
        running = worker.is_alive()
        while not queue.empty():
            number, target, outcome = queue.get()
            if target == "FINDING":
                findings.append((number, outcome))
            else:
                outcomes[f"{target}: {outcome}"] += 1
        if not running:
            return None if worker.exitcode == 0 else f"a crash: exit code {worker.exitcode}"
        if now.value != seen:
            seen, since = now.value, time.monotonic()
        elif time.monotonic() - since > SECONDS + 60 * (seen == 0):  # the first one imports
            worker.kill()
            worker.join()
            return f"a hang: nothing for {SECONDS} s"
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--target", choices=TARGETS, help="that alone")
    arguments = parser.parse_args()
    targets = (arguments.target,) if arguments.target else TARGETS
    begun = time.monotonic()
    outcomes, findings = fuzz(range(arguments.first, arguments.first + arguments.cases), targets)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:7} {outcome}")
    for number, what in findings[:20]:
        print(f"FINDING in case {number}: {what}")
    seconds = time.monotonic() - begun
    print(f"{sum(outcomes.values())} cases passed, {len(findings)} findings, {seconds:.0f} s")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
