"""Layers that run without being called: a HUT layer in their place would do nothing, silently."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MAMBA = ("x_proj", "dt_proj", "out_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_POSITIONS = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")

# Classes of torch, transformers 5 and diffusers, and those of their linear layers whose weight they
# read by themselves: always, while training, or where a fused kernel is installed.
_READ: dict[str, tuple[str, ...]] = {
    "MultiheadAttention": ("out_proj",),
    "LinearCrossEntropyLoss": ("linear",),
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "WavLMAttention": _ATTENTION,
    "HunyuanDiTAttentionPool": ("q_proj", "k_proj", "v_proj", "c_proj"),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DisentangledSelfAttention": ("in_proj",),
    "LSHSelfAttention": ("query_key", "value"),
    "TDNNLayer": ("kernel",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "LayoutLMv2Encoder": _POSITIONS,
    "LayoutLMv3Encoder": _POSITIONS,
    "PPDocLayoutV2ReadingOrderEncoder": _POSITIONS,
}


def reason_not_called(name: str, parent: nn.Module) -> str | None:
    """The reason why a layer's adapter would have no effect: its parent does not call the layer.

    Args:
        name: the layer's full name.
        parent: the module that holds it.

    Returns:
        None where the parent is not known to read the layer's weight by itself.
    """
    for kind in type(parent).__mro__:
        read = _READ.get(kind.__name__, ())
        if name.rpartition(".")[2] in read:
            library = "nn." if kind.__module__.startswith("torch.nn") else ""
            return (
                f"{library}{kind.__name__} reads its weight without calling it, so an adapter "
                f"would have no effect; leave out {', '.join(read)}"
            )
    return None


def switch_off_fused_inference(model: nn.Module, kind: type) -> None:
    """Make PyTorch's encoder layers call those linear layers that are of `kind`.

    The fused inference path of `nn.TransformerEncoder` reads their weights by itself.
    """
    for module in model.modules():
        if not any(isinstance(child, kind) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def is_untrained(hut_B: Tensor, transform: str, offset: float) -> bool:
    """Tell a factor that is as it was made: with any gradient at all, a step changes hut_B."""
    fresh = torch.zeros_like(hut_B)
    if transform == "two_sided":
        fresh.fill_(1.0)
    elif offset == 0:
        fresh[..., 0] = 1.0
    return torch.equal(hut_B, fresh)


def untrained_message(untrained: Iterable[str], layers: int) -> str | None:
    """The warning that some of a model's `layers` were left out of a training that changed others.

    Returns:
        None where all were trained, or none was.
    """
    names = list(untrained)
    if not names or len(names) == layers:
        return None
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (
        f"{len(names)} of {layers} HUT layers are as they were made, while training changed the "
        f"others: {', '.join(names[:10])}{more}. They received no gradient: the model reads their "
        f"weight without calling them, or they have no part in its loss"
    )
