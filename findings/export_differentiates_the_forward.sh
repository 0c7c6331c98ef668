#!/usr/bin/env bash
# An exported program ignores the backward of a torch.autograd.Function, without a word.
#
# torch 2.13.0. torch.export.export keeps what the Function's forward does and drops its backward. The
# exported module still records gradients, so differentiating it gives those of the forward as it
# stands. Seen with the usual straight-through rounding in x + round(x): the module's gradient is 2,
# torch.compile's is 2, the exported program's is 1, with strict=True and strict=False alike. Whoever
# fine-tunes or attacks through an exported model of such layers gets wrong numbers and no error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Model(torch.nn.Module):
    def forward(self, x):
        return x + RoundStraightThrough.apply(x)


def gradient(function, x):
    return torch.autograd.grad(function(x).sum(), x)[0].unique().tolist()


x = torch.randn(8, requires_grad=True)
seen = {
    "eager": gradient(Model(), x),
    "compiled": gradient(torch.compile(Model(), backend="aot_eager"), x),
    "exported": gradient(torch.export.export(Model(), (x,)).module(), x),
    "exported, strict": gradient(torch.export.export(Model(), (x,), strict=True).module(), x),
}
print(seen)
assert seen == {
    "eager": [2.0], "compiled": [2.0], "exported": [1.0], "exported, strict": [1.0]
}, "the behavior has changed"
PY
