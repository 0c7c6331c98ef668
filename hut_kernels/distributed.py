"""Tensor parallelism for HUT layers: styles for `torch.distributed.tensor.parallel`.

DDP and FSDP2 take HUT layers as they are (docs/distributed.md). Tensor parallelism has to know what
a parameter's dimensions mean, which is what the two styles here do:

    parallelize_module(block, mesh, {"up": HUTColwiseParallel(), "down": HUTRowwiseParallel()})
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from . import formats
from .errors import HUTBackendError
from .nn import HUTLinear

__all__ = ["HUTColwiseParallel", "HUTRowwiseParallel"]


class _ParallelHUTLinear(HUTLinear):
    """A HUT layer whose parameters are DTensors over a mesh of one dimension.

    What a rank computes of it is a HUT layer too, of the rank's shards.
    """

    side: ClassVar[str]  # the features that are sharded
    sharded: ClassVar[dict[str, int]]  # parameter: its dimension along that side
    local_input: ClassVar[Placement]
    local_output: ClassVar[Placement]

    mesh: DeviceMesh
    style: _HUTParallelStyle

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output in the style's layout, from x in the style's layout."""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, (self.style.input_layouts,), run_check=False)
        x = x.redistribute(placements=(self.local_input,))
        # Of a replicated input's gradient every rank has a part: what came through its shards.
        part = (Partial(),) if self.local_input.is_replicate() else None
        y = super().forward(x.to_local(grad_placements=part))
        output = DTensor.from_local(y, self.mesh, (self.local_output,), run_check=False)
        output = output.redistribute(placements=(self.style.output_layouts,))
        return output.to_local() if self.style.use_local_output else output

    def _forward_dropout(self, x: Tensor) -> Tensor:
        _refuse_dropout(type(self.style).__name__, self.dropout)

    def _local_matrix(self) -> Tensor:
        weight = _local(self.weight)
        return weight.t() if self.fan_in_fan_out else weight

    def _own_groups(self, factor: Tensor, dim: int) -> Tensor:
        """The factor whose groups, along `dim`, are those of this rank's shard of the features."""
        if self.transform != "two_sided":
            return factor
        return shard_groups(factor, dim, self.mesh.get_local_rank(), self.mesh.size())


class _ColwiseHUTLinear(_ParallelHUTLinear):
    side = "out_features"
    sharded: ClassVar = {"weight": 0, "bias": 0, "hut_B": 0, "gamma": 0, "beta": 0}
    local_input = Replicate()
    local_output = Shard(-1)

    def _forward(self, x: Tensor) -> Tensor:
        return self._linear(
            x,
            self._local_matrix(),
            self._own_groups(_summed(self.hut_A), 0),
            _local(self.hut_B),
            _local(self.bias),
            _local(self.gamma),
            _local(self.beta),
        )


class _RowwiseHUTLinear(_ParallelHUTLinear):
    side = "in_features"
    sharded: ClassVar = {"weight": 1, "hut_A": 1}
    local_input = Shard(-1)
    local_output = Partial()

    def _forward(self, x: Tensor) -> Tensor:
        # The sum over the ranks is linear, so each takes gamma into its own product, where d gamma
        # costs nothing; bias and beta go in once.
        return self._linear(
            x,
            self._local_matrix(),
            _local(self.hut_A),
            self._own_groups(_summed(self.hut_B), 1),
            self._once(self.bias),
            _summed(self.gamma),
            self._once(self.beta),
        )

    def _once(self, vector: nn.Parameter | None) -> Tensor | None:
        """The vector on the first rank, zeros elsewhere: all ranks join in its gradient's sum."""
        if vector is None:
            return None
        whole = _summed(vector)
        if self.mesh.get_local_rank() == 0:
            return whole
        # Filled and not multiplied by 0, for what is infinite would become NaN.
        return whole.masked_fill(torch.ones_like(whole, dtype=torch.bool), 0.0)


class _HUTParallelStyle(ParallelStyle):
    layer_class: ClassVar[type[_ParallelHUTLinear]]
    default_layouts: ClassVar[tuple[Placement, Placement]]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        self.input_layouts = input_layouts or self.default_layouts[0]
        self.output_layouts = output_layouts or self.default_layouts[1]
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if not isinstance(module, HUTLinear):
            raise TypeError(
                f"{name} is for HUTLinear; got {type(module).__name__}; torch.distributed has "
                f"styles for plain layers"
            )
        _check_shardable(name, module, device_mesh, self.layer_class.side)
        for key, parameter in list(module.named_parameters()):
            dim = self.layer_class.sharded.get(key)
            if key == "weight" and module.fan_in_fan_out:
                dim = 1 - self.layer_class.sharded["weight"]
            placement = Replicate() if dim is None else Shard(dim)
            shards = distribute_tensor(
                parameter.detach(), device_mesh, (placement,), src_data_rank=self.src_data_rank
            )
            module.register_parameter(key, nn.Parameter(shards, parameter.requires_grad))
        # In place: what a style returns for a submodule is not put into its parent.
        module.__class__ = self.layer_class
        module.mesh, module.style = device_mesh, self  # type: ignore[assignment]
        return module

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class HUTColwiseParallel(_HUTParallelStyle):
    """Shards a `HUTLinear` over a mesh by its output features.

    Every rank has its rows of `weight`, `bias`, `hut_B`, `gamma` and `beta`, and all of `hut_A`,
    whose gradient is summed over the mesh.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Args:
        input_layouts: how the input lies on the mesh; None means replicated. With `Shard(1)`, the
            sequence-parallel layout of `[batch, sequence, in_features]`, it is gathered first. A
            plain tensor is taken as this rank's part, and the parts to be of one size.
        output_layouts: how the output is to lie; None means sharded on its last dimension.
        use_local_output: whether a rank gets its part as a plain tensor, or a DTensor.

    Raises:
        TypeError: On another module than a HUTLinear (this and the rest from `parallelize_module`).
        ValueError: `out_features` does not divide by the mesh's size, `two_sided` has more groups
            than a rank has rows, the mesh has several dimensions, or the layer has dropout.
        HUTBackendError: The layer is sharded already.

    Examples:
        Under `torchrun`, which tells each process of the others; here on a mesh of one:

        >>> import torch
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from hut_kernels import HUTLinear
        >>> from hut_kernels.distributed import HUTColwiseParallel
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> layer = parallelize_module(HUTLinear(24, 16, r=4), mesh, HUTColwiseParallel())
        >>> layer.weight.placements
        (Shard(dim=0),)
        >>> layer(torch.randn(5, 24)).shape
        torch.Size([5, 16])
    """

    layer_class = _ColwiseHUTLinear
    default_layouts = (Replicate(), Shard(-1))


class HUTRowwiseParallel(_HUTParallelStyle):
    """Shards a `HUTLinear` over a mesh by its input features.

    Every rank has its columns of `weight` and `hut_A`, and all of `bias`, `hut_B`, `gamma` and
    `beta`, whose gradients are summed over the mesh.

    The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA
    (https://openreview.net/pdf?id=TwJrTz9cRS).

    Args:
        input_layouts: how the input lies on the mesh; None means sharded on its last dimension, as
            `HUTColwiseParallel` leaves its output. A plain tensor is taken as this rank's part.
        output_layouts: how the output is to lie; None means replicated. With `Shard(1)` the ranks'
            sums are scattered over the sequence.
        use_local_output: whether a rank gets its part as a plain tensor, or a DTensor.

    Raises:
        TypeError: On another module than a HUTLinear (this and the rest from `parallelize_module`).
        ValueError: `in_features` does not divide by the mesh's size, `two_sided` has more groups
            than a rank has columns, the mesh has several dimensions, or the layer has dropout.
        HUTBackendError: The layer is sharded already.

    Examples:
        Under `torchrun`, which tells each process of the others; here on a mesh of one:

        >>> import torch
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from hut_kernels import HUTLinear
        >>> from hut_kernels.distributed import HUTRowwiseParallel
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> layer = parallelize_module(HUTLinear(24, 16, r=4), mesh, HUTRowwiseParallel())
        >>> layer.weight.placements
        (Shard(dim=1),)
        >>> layer(torch.randn(5, 24)).shape
        torch.Size([5, 16])
    """

    layer_class = _RowwiseHUTLinear
    default_layouts = (Shard(-1), Replicate())


def _check_shardable(style: str, layer: HUTLinear, mesh: DeviceMesh, side: str) -> None:
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        raise HUTBackendError(
            f"{style}: the layer is sharded already; parallelize_module goes before fully_shard"
        )
    if formats.is_quantized(formats.base_weight(layer)):
        raise HUTBackendError(
            f"{style}: the weight is quantized ({type(layer.weight).__name__}), and a part of its "
            f"codes is no part of it: dequantize the model, or shard it by fully_shard"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f'{style} needs a mesh of one dimension, such as mesh["tp"]; got {mesh.ndim} dimensions'
        )
    if layer.dropout:
        _refuse_dropout(style, layer.dropout)
    features, size = getattr(layer, side), mesh.size()
    if features % size:
        raise ValueError(
            f"{style} needs {side} to divide by the mesh's size; got {features} over {size} ranks"
        )
    if layer.transform == "two_sided" and layer.r > features // size:
        raise ValueError(
            f"{style}: two_sided needs r <= {side} / ranks, a group for each feature of a shard at "
            f"most; got r={layer.r} with {features} / {size} = {features // size}"
        )


def _refuse_dropout(style: str, dropout: float) -> NoReturn:
    raise ValueError(f"{style}: dropout={dropout} would need one mask over all ranks; set it to 0")


def shard_groups(factor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """A `two_sided` factor for one of `size` equal shards of the features that `dim` groups.

    With n features a shard, feature i of shard s is in the layer's group
    `(s * n + i) * r // (size * n) = (s * r + i * r // n) // size` (a floor of a floor), and
    `i * r // n` is its group in the shard alone. So the shard's groups are the r from `s * r` on
    when each of the layer's stands `size` times in a row, wherever the borders fall.

    Args:
        factor: `hut_A` for shards of the output features, `hut_B` for shards of the input features.
        dim: the dimension of r: 0 for `hut_A`, 1 for `hut_B`.
        rank: which shard.
        size: how many shards.

    Returns:
        A tensor of factor's shape. Its gradient comes back to factor without atomics.
    """
    r, start = factor.shape[dim], rank * factor.shape[dim]
    first, last = start // size, (start + r - 1) // size
    repeated = factor.narrow(dim, first, last - first + 1).repeat_interleave(size, dim)
    return repeated.narrow(dim, start - first * size, r)


def _local(parameter: nn.Parameter | None) -> Any:
    """This rank's shard, or None."""
    return None if parameter is None else _sharded(parameter).to_local()


def _summed(parameter: nn.Parameter | None) -> Any:
    """A replicated parameter as a plain tensor, or None; its gradient is summed over the mesh."""
    if parameter is None:
        return None
    return _sharded(parameter).full_tensor(grad_placements=(Partial(),))


def _sharded(parameter: nn.Parameter) -> DTensor:
    """The parameter as the style laid it out; as FSDP2 shards it further it is not to be read."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
        return parameter
    raise HUTBackendError(
        "a parameter of a tensor-parallel layer is not a DTensor over the style's mesh: it was "
        "replaced, or the layer is sharded by FSDP2 and its forward was called past its hooks"
    )
