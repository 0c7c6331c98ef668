"""Fused kernels and layers for HUT (Hadamard Updated Transformation, arXiv 2409.13501)."""

from . import versions  # noqa: F401  first, for it refuses a PyTorch that is too old

# isort: split

from . import flops
from .adapter_file import adapter_options, adapter_state_dict, load_adapter, save_adapter
from .adapters import inject, merge
from .autograd import HUTLinearFunction
from .dispatch import backends
from .errors import HUTBackendError
from .experts import HUTExperts
from .explain import explain
from .functional import hut_linear, hut_weight
from .grouped import hut_grouped_linear
from .nn import PAPER, HUTLinear
from .optim import parameter_groups

flops.register()

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "HUTBackendError",
    "HUTExperts",
    "HUTLinear",
    "HUTLinearFunction",
    "adapter_options",
    "adapter_state_dict",
    "backends",
    "explain",
    "hut_grouped_linear",
    "hut_linear",
    "hut_weight",
    "inject",
    "load_adapter",
    "merge",
    "parameter_groups",
    "save_adapter",
]
