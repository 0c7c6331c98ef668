#!/usr/bin/env bash
# The gradient of a Linear4bit's input is that of another weight than its forward's.
#
# bitsandbytes 0.50.2, a CPU. A layer quantized from float16 weights keeps `quant_state.dtype` float16, and its
# `compute_dtype` may be another: float32 here, bfloat16 in most QLoRA scripts over float16 checkpoints. The
# forward dequantizes to the compute type, with one rounding. The backward of matmul_4bit dequantizes
# to quant_state.dtype first, and casts that to the gradient's type: two roundings, or one where the forward has
# none. Expected: dx = g W with the W of the forward. Seen at compute_dtype float32: dx is off by 2e-4, and
# equal to the bit to g times the weight rounded to float16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer.weight = bnb.nn.Params4bit(
    torch.randn(64, 128).half(), requires_grad=False, quant_type="nf4", compress_statistics=False
)
layer.to("cpu").train()
state = layer.weight.quant_state
codes = layer.weight.data.flatten()
codes = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
exact = state.code[codes] * state.absmax.repeat_interleave(state.blocksize)
exact = exact.view(64, 128)

x = torch.randn(5, 128, requires_grad=True)
y = layer(x)
g = torch.randn_like(y)
y.backward(g)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


forward, backward = error(y.detach(), x.detach() @ exact.T), error(x.grad, g @ exact)
twice = error(x.grad, g @ exact.half().float())
print(f"y off by {forward:.1e}, dx off by {backward:.1e}; by the weight in float16 {twice:.1e}")
assert forward < 1e-6 and backward > 5e-5 and twice < 1e-6, "the behavior has changed"
PY
