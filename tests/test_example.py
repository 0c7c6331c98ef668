"""HUT in full, against four lines of PyTorch; nothing else of the suite is needed to read this."""

import torch
import torch.nn.functional as F

from hut_kernels import hut_linear


def test_a_layer_is_a_linear_layer_whose_weight_is_scaled_elementwise():
    torch.manual_seed(0)
    x = torch.randn(5, 24, requires_grad=True)
    W0, bias = torch.randn(16, 24), torch.randn(16)
    A = torch.randn(3, 24, requires_grad=True)
    B = (torch.randn(16, 3) / 10).requires_grad_()

    y = hut_linear(x, W0, A, B, bias)
    expected = F.linear(x, W0 * (1 + B @ A), bias)
    torch.testing.assert_close(y, expected)

    # The gradients are exact, and the frozen weight has none.
    upstream = torch.randn(5, 16)
    ours = torch.autograd.grad(y, (x, A, B), upstream)
    theirs = torch.autograd.grad(expected, (x, A, B), upstream)
    for gradient, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)
