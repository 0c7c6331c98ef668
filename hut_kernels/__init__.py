"""Fused kernels and layers for HUT (Hadamard Updated Transformation, arXiv 2409.13501)."""

from . import versions  # noqa: F401  first, for it refuses a PyTorch that is too old

# isort: split

from . import flops
from .adapters import (
    adapter_options,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from .autograd import HUTLinearFunction
from .dispatch import backends, explain
from .errors import HUTBackendError
from .functional import hut_linear, hut_weight
from .nn import PAPER, HUTLinear

flops.register()

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "HUTBackendError",
    "HUTLinear",
    "HUTLinearFunction",
    "adapter_options",
    "adapter_state_dict",
    "backends",
    "explain",
    "hut_linear",
    "hut_weight",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
]
