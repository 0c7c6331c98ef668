#!/usr/bin/env bash
# torch._grouped_mm cannot take part in loss = y.sum(), and FlopCounterMode does not see it at all.
#
# torch 2.13.0, CPU. The gradient of sum() is one number expanded to y's shape (strides 0, 0). The
# backward of _grouped_mm hands it on as it is and raises "Invalid strides/sizes, got [0, 0]"; the same
# gradient made contiguous works. Any loss that ends in a sum or mean right after grouped experts meets
# this. And a forward that costs 8,192 operations as a bmm over the same numbers counts as 0 in
# torch.utils.flop_counter, so counts of today's mixture-of-experts models leave out the experts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode

x = torch.randn(8, 16, requires_grad=True)
weight = torch.randn(2, 16, 32, requires_grad=True)
ends = torch.tensor([4, 8], dtype=torch.int32)

try:
    torch._grouped_mm(x, weight, offs=ends).sum().backward()
    error = ""
except RuntimeError as raised:
    error = str(raised)
print("y.sum().backward():", error)
y = torch._grouped_mm(x, weight, offs=ends)
y.backward(torch.ones_like(y))  # the same gradient, contiguous

with FlopCounterMode(display=False) as grouped:
    torch._grouped_mm(x, weight, offs=ends)
with FlopCounterMode(display=False) as batched:
    torch.bmm(x.view(2, 4, 16), weight)
print("operations counted:", grouped.get_total_flops(), "grouped,", batched.get_total_flops(), "bmm")
assert "[0, 0]" in error, "the behavior has changed"
assert (grouped.get_total_flops(), batched.get_total_flops()) == (0, 8192), "the count has changed"
PY
