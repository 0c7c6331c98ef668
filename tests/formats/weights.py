"""Quantized weights for tests, and what their libraries dequantize them to, by another road."""

import pytest
import torch

from hut_kernels.formats.four_bit import TABLES

bnb = pytest.importorskip("bitsandbytes")


def four_bit(weight, quant_type="nf4", block=64, nested=True, storage=torch.uint8):
    """A `Params4bit` of the weight."""
    parameter = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=quant_type,
        blocksize=block,
        compress_statistics=nested,
        quant_storage=storage,
    )
    return parameter.to("cpu")


def dequantized(parameter):
    """A `Params4bit` by the format's definition, code by code, in the type of its quant_state.

    bitsandbytes' own CPU kernel is wrong where in_features is a multiple of 16, but not of the
    block, and asks a compiler for odd ones.
    """
    state = parameter.quant_state
    codes = parameter.data.view(torch.uint8).flatten()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten()[: state.shape.numel()]
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.float().repeat_interleave(state.blocksize)[: len(codes)]
    values = torch.tensor(TABLES[state.quant_type])[codes.long()] * scales
    return values.view(state.shape).to(state.dtype)


def linear4bit(out_features=96, in_features=64, bias=True, **options):
    """A `Linear4bit` on the CPU; `compute_dtype` and what `four_bit` takes as options."""
    dtype = options.pop("dtype", torch.float32)
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias=bias,
        compute_dtype=options.pop("compute_dtype", None),
        quant_storage=options.get("storage", torch.uint8),
    )
    layer.weight = four_bit((torch.randn(out_features, in_features) / 8).to(dtype), **options)
    layer.weight.module, layer.quant_state = layer, layer.weight.quant_state
    return layer.to("cpu")


def linear8bit(out_features=96, in_features=64, bias=True):
    """A `Linear8bitLt` on the CPU."""
    layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    return layer.to("cpu")


def repacked(layer):
    """A `Linear4bit` as one evaluation on a CPU with AVX512-BF16 leaves it.

    bitsandbytes repacks it in Python, which every CPU runs.
    """
    layer.eval()
    packed = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    layer.weight.data, layer.weight.quant_state = packed
    return layer


def assert_loss_falls(model, x, lr):
    """Trains a model to give 0: the loss of each of five steps is below the one before."""
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr)
    losses = []
    for _ in range(5):
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def assert_compiles_alike(model, x):
    """Compiles a model without a break, to the same output and gradients."""
    results = []
    for each in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = each(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
