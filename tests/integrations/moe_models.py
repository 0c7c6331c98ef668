"""Small mixture-of-experts models of transformers, from configurations alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = {**_COMMON, "num_hidden_layers": 2}
_TOP = {"num_experts_per_tok": 2}

CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_LAYERS, **_TOP, intermediate_size=48, moe_intermediate_size=24, num_experts=4, head_dim=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_LAYERS, **_TOP, intermediate_size=24, num_local_experts=4
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **_LAYERS, **_TOP, intermediate_size=24, num_experts=4
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_LAYERS, **_TOP, intermediate_size=24, num_local_experts=4, head_dim=8,
        layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default"},
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_LAYERS, "num_key_value_heads": 4}, **_TOP, intermediate_size=48,
        moe_intermediate_size=24, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **_LAYERS, **_TOP, intermediate_size=24, num_local_experts=4
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_COMMON, **_TOP, layers_block_type=["moe", "attention", "moe"], head_dim=8,
        intermediate_size=24, n_routed_experts=4, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24, use_mamba_kernels=False, mamba_num_heads=4,
        mamba_head_dim=8, n_groups=1, ssm_state_size=8,
    ),
    "aria_text": lambda: transformers.AriaTextConfig(
        **_LAYERS, intermediate_size=24, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
    ),
}  # fmt: skip


def tiny(name: str, **options: Any) -> nn.Module:
    """A small random model, whose experts differ from one another."""
    kind = transformers.AutoModelForCausalLM
    if name == "aria_text":
        kind = transformers.models.aria.modeling_aria.AriaTextForCausalLM
    from_config = getattr(kind, "from_config", None) or kind._from_config
    model = from_config(CONFIGS[name](), **options)
    with torch.no_grad():
        for module in experts_of(model):
            for parameter in module.parameters():
                parameter.normal_(0, 0.2)
    return model


def experts_of(model: nn.Module) -> list[Any]:
    """The modules that hold stacks of experts."""
    return [m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "is_transposed")]


def parameters_of(experts: Any) -> list[str]:
    """The stacks of one of them."""
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]


def routed(experts: Any, tokens: int = 9, idle: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, choices and weights for an experts' module; the last `idle` experts get none.

    The choices are fixed, for a router's near ties would move tokens from one expert to another.
    """
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    dtype = experts.down_proj.dtype
    chances = torch.rand(tokens, experts.num_experts - idle)
    index = chances.topk(2).indices
    weights = torch.rand(tokens, 2).softmax(-1).to(dtype)
    return torch.randn(tokens, hidden, dtype=dtype), index, weights


def ids(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, 64, (rows, length))
