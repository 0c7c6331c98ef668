"""The estimate: memory and time of a training step on a GPU by its data sheet; no GPU is needed.

Memory is that of a real step on tensors without data: each allocation and release of PyTorch's
operators counts, and the workspaces of HUT's plan. Time is a roofline of the linear layers.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hut_kernels import devices, planner
from hut_kernels.multiplier import Multiplier
from hut_kernels.nn import is_conv1d

from ..data_sheets import Sheet
from ..providers import PROVIDERS
from ..shapes import Shape
from . import cost
from .model import Recipe, checkpointed

METHODS = ("hut_low_rank", "hut_paper", "peft_lora", "peft_lora_cast", "peft_hira", "full")
BASES = {"bf16": 2.0, "nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes a weight; NF4 in blocks of 64
RESERVED = 1.0  # GiB: the CUDA context, cuBLAS workspaces, fragments
GIB = 1 << 30
ADAM, MASTER = 8, 4  # bytes a trained number: two float32 states; full fine-tuning's float32 copy


@dataclass(frozen=True)
class Request:
    """A training step to estimate.

    Attributes:
        recipe: The model.
        targets: `"few"`, `"all"`, or names joined by `+`.
        r: Rank of the factors.
        base: A key of `BASES`.
        batch, sequence: Of the tokens.
        checkpointing: Whether blocks are computed again in backward.
    """

    recipe: Recipe
    targets: str
    r: int
    base: str
    batch: int
    sequence: int
    checkpointing: bool
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


@dataclass(frozen=True)
class Figures:
    """Bytes and seconds of a step, all linear in the number of blocks.

    Attributes:
        weights, trained: Bytes of the frozen and trained weights; the count of trained numbers.
        kept: Bytes kept for backward when the forward has ended.
        peak: The most bytes above weights, adapters and optimizer states.
        widest: Bytes of the largest linear layer's weight.
        seconds: Of the linear layers, by the roofline.
    """

    weights: float
    trained: float
    kept: float
    peak: float
    widest: float
    seconds: float


Workspace = Callable[[str, Mapping[str, Any]], int]


class Ledger(TorchDispatchMode):
    """Counts the bytes that operators hand out and that are let go.

    Args:
        workspace: The bytes that an operator of HUT takes inside, by its name and arguments.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()
        self.workspace, self.live, self.peak = workspace, 0, 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        out = func(*args, **kwargs)
        for tensor in filter(_is_tensor, tree_leaves(out)):
            self._add(tensor, given)
        inside = 0
        if func.namespace == "hut":
            names = (argument.name for argument in func._schema.arguments)
            inside = self.workspace(
                func._opname, {**dict(zip(names, args, strict=False)), **kwargs}
            )
        self.peak = max(self.peak, self.live + inside)
        return out

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in given or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def step_bytes(
    model: nn.Module,
    inputs: Callable[[], Mapping[str, Tensor]],
    grad: Callable[[], Tensor] | None,
    sheet: Sheet | None,
) -> tuple[int, int]:
    """Bytes kept after a forward, and the most during forward and backward, above what is there.

    Args:
        model: On the meta device.
        inputs: Makes its inputs.
        grad: Makes the output's gradient; None where the output has a loss.
        sheet: The GPU; None for the CPU's path.
    """
    with _unpacked(), FakeTensorMode():
        _without_data(model)
        given, upstream = inputs(), grad() if grad else None
        with Ledger(_workspace_on(sheet)) as ledger:
            output = model(**given) if grad else model(**given).loss  # logits go
            kept = ledger.live
            output.backward(upstream)
    return kept, ledger.peak


@contextlib.contextmanager
def _unpacked() -> Iterator[None]:
    """Tells transformers that no two texts share a row, which it would read from data."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    kept = getattr(masking_utils, name, None)
    if kept is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if kept is not None:
            setattr(masking_utils, name, kept)


def _without_data(model: nn.Module) -> None:
    """Moves parameters and buffers from the meta device to tensors of a CPU without data."""
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in seen:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    seen[id(old)] = new
                tensors[name] = seen[id(old)]


def _workspace_on(sheet: Sheet | None) -> Workspace:
    device = next((one for one in devices.DEVICES if sheet and one.arch == sheet.arch), None)

    def workspace(name: str, given: Mapping[str, Any]) -> int:
        x, weight = given["x"], given["weight"]
        if device is None:  # PyTorch forms W once a pass
            W = weight.numel() * x.dtype.itemsize
            if given["transform"] == "low_rank":
                return W
            # T, and H0 times a factor, exist a tile at a time.
            tile = Multiplier(given["hut_B"], given["hut_A"], given["transform"]).tiles()[0]
            return W + 2 * (tile.stop - tile.start) * weight.shape[1] * 4
        O, K = weight.shape
        sizes = x.numel() // K, K, O, given["hut_A"].shape[0]
        types = (str(t.dtype).removeprefix("torch.") for t in (x, weight))
        plan = planner.plan(
            planner.Problem(*sizes, *types, transform=given["transform"]), device, "triton"
        )
        parts = ("forward",) if name == "forward" else planner.PARTS[1:]
        return max(plan.workspace[part] for part in parts)

    return workspace


def figures(request: Request, method: str, blocks: int, sheet: Sheet | None) -> Figures:
    """Figures of a model of a few blocks."""
    with torch.device("meta"):
        base = request.recipe.build(blocks).to(request.dtype)
    base = checkpointed(base) if request.checkpointing else base
    linear = {name: _shape(m) for name, m in base.named_modules() if _shape(m)}
    of_blocks = {name for name in linear if any(part.isdigit() for part in name.split("."))}
    names = request.recipe.names(request.targets, base)
    adapted = {name for name in of_blocks if name.rpartition(".")[2] in names}
    if method == "full":
        model, adapted = base.requires_grad_(True), set(linear)
    else:
        pattern = request.recipe.pattern(request.targets, base)
        model = PROVIDERS[method].adapt(base, pattern, request.r)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    frozen = every if method == "full" else every - trained
    quantized = sum(K * O for name, (O, K) in linear.items() if name in of_blocks)
    wide = request.dtype.itemsize
    item = wide if method == "full" or request.base == "bf16" else BASES[request.base]
    size = request.batch, request.sequence, torch.device("cpu")
    kept, peak = step_bytes(model, lambda: request.recipe.batch(*size), None, sheet)
    return Figures(
        weights=wide * (frozen - quantized) + item * quantized,
        trained=trained,
        kept=kept,
        peak=peak,
        widest=wide * max(O * K for O, K in linear.values()),
        seconds=sum(
            _roofline(
                _method(method) if name in adapted else "frozen", Shape(request.tokens, K, O),
                request.r, request.checkpointing and name in of_blocks, sheet,
            )
            for name, (O, K) in linear.items()
        ) if sheet else 0.0,
    )  # fmt: skip


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """`(out_features, in_features)` of a linear layer."""
    if is_conv1d(module):
        K, O = module.weight.shape
        return O, K
    return tuple(module.weight.shape) if isinstance(module, nn.Linear) else None


def _method(name: str) -> str:
    method = PROVIDERS[name].method
    assert method is not None
    return method


def _roofline(method: str, shape: Shape, r: int, again: bool, sheet: Sheet) -> float:
    """Seconds of a layer's step: each direction's operations or bytes at the data sheet's rates."""
    counts = cost.METHODS[method]
    forward, backward = (
        max(operations / (1e12 * sheet.tflops), moved / (1e9 * sheet.bandwidth))
        for operations, moved in zip(
            counts.operations(shape, r), counts.moved(shape, r, 2), strict=True
        )
    )
    return (1 + again) * forward + backward


@dataclass(frozen=True)
class Estimate:
    """A method's memory in bytes, and its step in seconds."""

    label: str
    trained: float
    weights: float
    adapters: float
    gradients: float
    optimizer: float
    kept: float
    workspace: float
    total: float
    seconds: float


def estimates(request: Request, sheet: Sheet, methods: Sequence[str] = METHODS) -> list[Estimate]:
    """An estimate of each method, from models of one and two blocks."""
    return [_estimate(request, method, sheet) for method in methods]


def _estimate(request: Request, method: str, sheet: Sheet | None) -> Estimate:
    one, two = (vars(figures(request, method, blocks, sheet)) for blocks in (1, 2))
    more = request.recipe.blocks - 1
    found = Figures(**{name: one[name] + more * (two[name] - one[name]) for name in one})
    full, cast = method == "full", PROVIDERS[method].adapters == "compute"
    size = 2 if full or cast else 4
    gradients = size * found.trained
    # torch's Adam has its states in the type of what it trains.
    optimizer = (ADAM + MASTER if full else 2 * size) * found.trained
    adapters = 0 if full else size * found.trained
    dequantized = 0 if full or request.base == "bf16" else found.widest
    peak = found.peak + dequantized
    label = "full fine-tuning, bf16" if full else PROVIDERS[method].label
    if request.base != "bf16" and method.startswith("peft_lora"):
        label = f"QLoRA ({request.base}, PEFT{', adapters cast' if cast else ''})"
    return Estimate(
        label, found.trained, found.weights, adapters, gradients, optimizer, found.kept,
        max(0.0, peak - found.kept - gradients),
        found.weights + adapters + optimizer + max(peak, gradients), found.seconds,
    )  # fmt: skip


FORMULA = (
    "ESTIMATE, not measured. Memory is counted, operator by operator. Time is the sum, over the "
    "linear layers and directions, of the larger of operations / TFLOP/s and bytes / GB/s by the "
    "data sheet, without attention, norms and loss: a real step takes longer."
)
