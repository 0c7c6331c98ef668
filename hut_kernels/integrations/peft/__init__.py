"""HUT in Hugging Face PEFT: a tuner, faster HiRA layers, and adapters of either as the other.

Importing this package registers the tuner with PEFT: `get_peft_model(model, HUTConfig(...))` and
everything around it then work, and so does loading adapters that were saved with it.
"""

import peft

from ...versions import release

if release(peft.__version__) < (0, 20):
    raise ImportError(
        f"hut_kernels.integrations.peft needs PEFT 0.20 or newer; {peft.__version__} is "
        f"installed: pip install --upgrade peft"
    )

# isort: split

from .config import HUTConfig
from .convert import ConvertedAdapter, from_hira, from_native, to_hira, to_native
from .hira import HiraReport, accelerate_hira, restore_hira
from .layer import HUTLayer
from .model import HUTModel
from .registration import register

register(HUTConfig, HUTModel)

__all__ = [
    "ConvertedAdapter",
    "HUTConfig",
    "HUTLayer",
    "HUTModel",
    "HiraReport",
    "accelerate_hira",
    "from_hira",
    "from_native",
    "restore_hira",
    "to_hira",
    "to_native",
]
