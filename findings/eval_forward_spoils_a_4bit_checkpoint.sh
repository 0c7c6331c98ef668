#!/usr/bin/env bash
# One evaluation forward on a CPU makes a 4-bit layer's next checkpoint wrong, for good.
#
# bitsandbytes 0.50.2, a CPU with AVX512 (others do not repack; the script says so and stops). In eval()
# Linear4bit repacks its weight, its absmax (float32 [128] becomes bfloat16 [2, 64], transposed) and
# its quant_state in place, and train() does not undo it. dequantize_4bit of the stored weight is then
# off by more than 100 %. Asking for state_dict() afterwards (without double quantization) leaves layer
# and checkpoint off: the training forward, right before, differs by over 20 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

if "AVX512" not in torch.backends.cpu.get_cpu_capability():
    raise SystemExit("not applicable: this CPU has no AVX512, so nothing is repacked")

import bitsandbytes as bnb

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(
    128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
)
layer.weight = bnb.nn.Params4bit(
    torch.randn(64, 128), requires_grad=False, quant_type="nf4", compress_statistics=False
)
layer.to("cpu")
x = torch.randn(4, 128, dtype=torch.bfloat16)


def dequantized():
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def relative(new, old):
    return ((new.reshape(old.shape) - old).norm() / old.norm()).item()


weight, trained = dequantized(), layer.train()(x)
evaluated = layer.eval()(x)
layer.train()
stored = relative(dequantized(), weight)
layer.state_dict()
after = relative(layer(x), trained)
print(
    f"eval forward off by {relative(evaluated, trained):.3f}, "
    f"dequantize_4bit of the repacked weight by {stored:.2f}, "
    f"the training forward after state_dict() by {after:.2f}"
)
assert relative(evaluated, trained) < 0.01, "the behavior has changed"
assert stored > 1 and after > 0.2, "the behavior has changed"
PY
