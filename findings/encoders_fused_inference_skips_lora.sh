#!/usr/bin/env bash
# LoRA in nn.TransformerEncoder trains, and has no effect in eval().
#
# torch 2.13.0, peft 0.21.2. In eval() with frozen weights, nn.TransformerEncoderLayer takes a fused path that reads
# linear1.weight and linear2.weight by itself. PEFT's layers hand out the base weight under that name, so the
# path runs and the adapters are passed over, without a warning: outputs in eval() are those of the base model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
lora = LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
model = get_peft_model(nn.TransformerEncoder(layer, 2), lora)
x = torch.randn(2, 5, 16)


def effect():
    y = model(x)
    with model.disable_adapter():
        return (model(x) - y).abs().max().item()


seen = {"train": effect()}
model.eval()
seen["eval"] = effect()
print("change of the outputs by the adapters:", seen)
assert seen["train"] > 0.1, "the behavior has changed"
assert seen["eval"] == 0.0, "the behavior has changed"
PY
