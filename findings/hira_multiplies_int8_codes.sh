#!/usr/bin/env bash
# HiRA over bitsandbytes' int8 layers multiplies the integer codes, unless the model carries a flag.
#
# peft 0.21.2, bitsandbytes 0.50.2, CPU. Models that transformers quantized have is_loaded_in_8bit set;
# one whose Linear8bitLt layers were put in by hand has not, and PEFT then takes its ordinary HiRA layer,
# whose delta is (codes -127..127) * (B A) with no scale. No warning. Seen on a 64 x 64 layer: relative
# error of the output above 100 without the flag, below 0.02 with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import bitsandbytes as bnb
import torch
from peft import HiraConfig, get_peft_model

logging.disable(logging.WARNING)
x = torch.randn(4, 64)


def error(flagged):
    torch.manual_seed(0)
    weight = torch.randn(64, 64) / 8
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    model = torch.nn.Sequential(layer).to("cpu")
    model(x)  # quantizes
    if flagged:
        model.is_loaded_in_8bit = True
    adapted = get_peft_model(model, HiraConfig(r=2, target_modules=["0"], init_weights=False))
    factors = [p for p in adapted.parameters() if p.requires_grad]
    A, B = sorted(factors, key=lambda factor: factor.shape[0])
    right = x @ (weight * (1 + B @ A)).T
    return ((adapted.eval()(x) - right).norm() / right.norm()).item()


without, with_flag = error(False), error(True)
print(f"relative error: {without:.3g} without the flag, {with_flag:.3g} with it")
assert without > 100 and with_flag < 0.02, "the behavior has changed"
PY
