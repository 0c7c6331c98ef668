#!/usr/bin/env bash
# once_differentiable does not stop a gradient penalty: it silently adds nothing.
#
# torch 2.13.0. The decorator is there so that a second derivative that the backward cannot give raises
# an error. It raises only where the incoming gradient itself requires grad. Under loss = f(x).sum(), the
# incoming gradient is a constant, so torch.autograd.grad(..., create_graph=True) returns a tensor that
# does not require grad, and a penalty made of it contributes zero. Seen for f(x) = x^2 at x = 3 and
# loss = f + (df/dx)^2: the gradient is 6 where 30 is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def gradient_with_penalty(function):
    x = torch.tensor([3.0], requires_grad=True)
    y = function(x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    (y + (slope**2).sum()).backward()
    return x.grad.item()


seen = gradient_with_penalty(lambda x: x * x), gradient_with_penalty(Square.apply)
print("plain PyTorch, once_differentiable:", seen)
assert seen == (30.0, 6.0), "the behavior has changed"
PY
