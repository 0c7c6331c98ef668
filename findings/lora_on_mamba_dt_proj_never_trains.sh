#!/usr/bin/env bash
# LoRA on Mamba's dt_proj is accepted, counted as trainable, and never used.
#
# transformers 5.23.0, peft 0.21.2. PEFT refuses out_proj and conv1d of Mamba models, because the mixer
# reads their weights without calling the layers. dt_proj is read in the same way and is not refused:
# after a backward its factors have no gradient, while in_proj's have, and changing them does not change
# the logits at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

logging.disable(logging.WARNING)
torch.manual_seed(0)
config = MambaConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4
)
targets = ["in_proj", "dt_proj"]
lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
model = get_peft_model(MambaForCausalLM(config), lora)
tokens = torch.randint(0, 32, (2, 8))
model(input_ids=tokens, labels=tokens).loss.backward()

factors = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
trained = {
    target: all(p.grad is not None for name, p in factors if target in name) for target in targets
}
before = model(input_ids=tokens).logits
with torch.no_grad():
    for name, factor in factors:
        if "dt_proj" in name:
            factor.add_(1.0)
change = (model(input_ids=tokens).logits - before).abs().max().item()
print("gets gradients:", trained, "change of the logits by dt_proj's factors:", change)
assert trained == {"in_proj": True, "dt_proj": False}, "the behavior has changed"
assert change == 0.0, "the behavior has changed"
PY
