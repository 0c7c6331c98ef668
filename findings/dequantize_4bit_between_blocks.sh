#!/usr/bin/env bash
# dequantize_4bit is wrong on a CPU where rows are whole multiples of 16 but not of the block.
#
# bitsandbytes 0.50.2, a CPU with AVX512 (on others the script says so and stops). Blocks run on across rows. The
# vectorized CPU path reads each row as if it began a block, for in_features that are a multiple of 16 and
# not of the block size: 80, 96, 1104 (and 4304, the MLP of SigLIP so400m). 100 is right, for there the
# plain path is taken. Expected: table[code] * absmax of the element's own block. Seen with rows of different
# size, block 64: relative error over 0.3 at 80 and 96, and 0 at 100 and 128.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch

if "AVX512" not in torch.backends.cpu.get_cpu_capability():
    raise SystemExit("not applicable: this CPU has no AVX512, so the plain path runs")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def error(columns, block=64):
    torch.manual_seed(0)
    weight = torch.randn(64, columns) * torch.logspace(-2, 0, 64)[:, None]
    packed, state = quantize_4bit(weight, blocksize=block, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scale = state.absmax.repeat_interleave(block)[: len(codes)]
    right = (state.code[codes] * scale).view(64, columns)
    return ((dequantize_4bit(packed, state) - right).norm() / right.norm()).item()


seen = {columns: error(columns) for columns in (80, 96, 100, 128)}
print("relative error by in_features:", {k: round(v, 3) for k, v in seen.items()})
assert seen[80] > 0.3 and seen[96] > 0.3, "the behavior has changed"
assert seen[100] < 1e-6 and seen[128] < 1e-6, "the behavior has changed"
PY
