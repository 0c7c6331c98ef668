"""Known defects, planted one at a time: does the suite see each of them?

`python -m tests.mutants [--jobs 2] [--only TEXT] [--list]` copies the package, its tools and its
tests to a temporary folder, applies one defect, runs the tests that must notice, and wants them to
fail. It prints a table, and exits with 1 if a defect survives or if the tests fail without one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("hut_kernels", "tests", "tools", "csrc")


@dataclass(frozen=True)
class Mutant:
    """A defect: `old`, which stands exactly once in `file`, becomes `new`.

    `tests` are the file that must fail and a `-k` expression.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


DEFINITION = "hut_kernels/definition.py"
LAYER = "hut_kernels/layer.py"
TORCH = "hut_kernels/torch_backend.py"
ONEDNN = "hut_kernels/onednn.py"
AUTOGRAD = "hut_kernels/autograd.py"
OPS = "hut_kernels/ops.py"
RULES = "hut_kernels/rules.py"
FUNCTIONAL = "hut_kernels/functional.py"
CHECKS = "hut_kernels/checks.py"
ADAPTERS = "hut_kernels/adapter_file.py"
FLOPS = "hut_kernels/flops.py"
DISTRIBUTED = "hut_kernels/distributed.py"
NN = "hut_kernels/nn.py"
EXPERTS = "hut_kernels/integrations/experts.py"
GROUPED = "hut_kernels/grouped.py"
GROUPED_BACKEND = "hut_kernels/grouped_backend.py"
VERSIONS = "hut_kernels/versions.py"
DISPATCH = "hut_kernels/dispatch.py"
PEFT = "hut_kernels/integrations/peft"
PLANNER = "hut_kernels/planner.py"
TRITON = "hut_kernels/triton"
FOUR_BIT = "hut_kernels/formats/four_bit.py"
INT8 = "hut_kernels/formats/int8.py"
CSRC = "csrc"  # compiled for the CPU, so it takes nvcc

MUTANTS = (
    Mutant(
        "the offset's sign",
        DEFINITION,
        "        return spec.offset + spec.scaling * (hut_B @ hut_A)\n",
        "        return -spec.offset + spec.scaling * (hut_B @ hut_A)\n",
        ("tests/test_definition.py", "loops"),
    ),
    Mutant(
        "p and q swapped in the definition",
        DEFINITION,
        "    return hut_B.index_select(1, q) * hut_A.index_select(0, p)\n",
        "    q, p = p[:1].expand(in_features), q[:1].expand(out_features)\n"
        "    return hut_B.index_select(1, q) * hut_A.index_select(0, p)\n",
        ("tests/test_definition.py", "loops"),
    ),
    Mutant(
        "split computed as merged",
        TORCH,
        "        return split_forward(x, layer, _stage(layer, x.dtype), total_bias)\n",
        "        return F.linear(x, _merged(layer, x.dtype), total_bias)\n",
        ("tests/test_functional.py", "thousandth or cancels"),
    ),
    Mutant(
        "T rounded to 16 bits first",
        TORCH,
        "    return T.mul_(W0)\n",
        "    return T.copy_(T.to(W0.dtype)).mul_(W0)\n",
        ("tests/test_functional.py", "cancels"),
    ),
    Mutant(
        "gamma forgotten in T's constant",
        TORCH,
        "    return multiplier, scale * shift if shift else shift\n",
        "    return multiplier, shift\n",
        ("tests/test_ops.py", "match_the_reference"),
    ),
    Mutant(
        "the last block of rows dropped",
        TORCH,
        "    if block:\n        yield block\n",
        "    if block and len(block) > 1:\n        yield block\n",
        ("tests/test_torch_backend.py", "row_block"),
    ),
    Mutant(
        "a tile of several groups takes the first one's factor",
        "hut_kernels/multiplier.py",
        "        first, groups = rows.start // size, max(1, count // size)\n",
        "        first, groups = rows.start // size, 1\n",
        ("tests/test_torch_backend.py", "few_tokens or any_row_block"),
    ),
    Mutant(
        "one token's W in another order of rows",
        TORCH,
        "        return torch.cat(parts, -1)\n",
        "        return torch.cat(parts[::-1], -1)\n",
        ("tests/test_torch_backend.py", "few_tokens"),
    ),
    Mutant(
        "few tokens' dx of the last group only",
        TORCH,
        "                dx += (A * U).sum(0)\n",
        "                dx = (A * U).sum(0)\n",
        ("tests/test_torch_backend.py", "few_tokens"),
    ),
    Mutant(
        "an operator hidden from the modes",
        "hut_kernels/rules.py",
        "        torch._C._len_torch_dispatch_stack()\n        or ",
        "        ",
        ("tests/test_ops.py", "looks"),
    ),
    Mutant(
        "options that are kept after they have changed",
        CHECKS,
        "        return _kept_spec(transform, offset, scaling, precision)\n",
        "        return _kept_spec(transform, 1.0, 1.0, 'merged')\n",
        ("tests/test_nn.py", "between_calls or by_now"),
    ),
    Mutant(
        "G in float16",
        TORCH,
        "acc if few or x_dtype == torch.float16 or",
        "acc if few or",
        ("tests/test_torch_backend.py", "overflow"),
    ),
    Mutant(
        "gamma forgotten in the H of d hut_A",
        TORCH,
        "        B = cast(B, acc) * cast(layer.gamma, acc).unsqueeze(1)\n",
        "        pass\n",
        ("tests/test_ops.py", "match_the_reference"),
    ),
    Mutant(
        "gamma forgotten in the H of d hut_B",
        LAYER,
        "        d_B = P if gamma is None else P * gamma[..., None]\n",
        "        d_B = P\n",
        ("tests/test_ops.py", "match_the_reference"),
    ),
    Mutant(
        "d hut_A doubled",
        LAYER,
        "        d_A = cast(_scaled(Q, spec.scaling), hut_A.dtype)\n",
        "        d_A = cast(_scaled(2 * Q, spec.scaling), hut_A.dtype)\n",
        ("tests/test_functional.py", "proportions"),
    ),
    Mutant(
        "scaling forgotten in d hut_B",
        LAYER,
        "        d_B = cast(_scaled(d_B, spec.scaling), hut_B.dtype)\n",
        "        d_B = cast(d_B, hut_B.dtype)\n",
        ("tests/test_autograd.py", "gradcheck"),
    ),
    Mutant(
        "d gamma without the offset's part",
        LAYER,
        "            d_gamma = d_gamma + spec.constant * row_sums\n",
        "            d_gamma = d_gamma + 0 * row_sums\n",
        ("tests/test_autograd.py", "gradcheck"),
    ),
    Mutant(
        "d gamma without the bias's part",
        AUTOGRAD,
        "            d_gamma = d_gamma + bias * sums\n"
        "        if need_beta:\n            d_beta = sums.to(beta",
        "            d_gamma = d_gamma + 0 * sums\n"
        "        if need_beta:\n            d_beta = sums.to(beta",
        ("tests/test_autograd.py", "gradcheck"),
    ),
    Mutant(
        "sums over the tokens in 16 bits",
        AUTOGRAD,
        "sums = as_rows(grad).sum(0, dtype=acc_dtype(grad.dtype))",
        "sums = as_rows(grad).sum(0)",
        ("tests/test_autograd.py", "autocast"),
    ),
    Mutant(
        "an out x in tensor saved for backward",
        AUTOGRAD,
        "(x if uses_G else None, weight, hut_A, hut_B, bias, gamma, *scales)\n",
        "(x if uses_G else None, weight.clone(), hut_A, hut_B, bias, gamma, *scales)\n",
        ("tests/test_autograd.py", "saved"),
    ),
    Mutant(
        "x saved where nobody needs it",
        AUTOGRAD,
        "(x if uses_G else None, weight, hut_A, hut_B, bias, gamma, *scales)\n",
        "(x, weight, hut_A, hut_B, bias, gamma, *scales)\n",
        ("tests/test_autograd.py", "saved"),
    ),
    Mutant(
        "dx computed though nobody asked",
        TORCH,
        "        dx = grad_input(grad, layer) if need_x else None\n",
        "        dx = grad_input(grad, layer)\n",
        ("tests/test_autograd.py", "asked_for"),
    ),
    Mutant(
        "differentiable twice, silently wrong",
        AUTOGRAD,
        "torch.is_grad_enabled():\n            return _Once.apply(_gradients, ",
        "False:\n            return _Once.apply(_gradients, ",
        ("tests/test_autograd.py", "once_differentiable or no_route"),
    ),
    Mutant(
        "differentiable twice, but not by every tensor",
        AUTOGRAD,
        "_Once.apply(_gradients, ctx, grad, *ctx.saved_tensors)\n",
        "torch.autograd.function.once_differentiable(_gradients)(\n"
        "                ctx, grad, *ctx.saved_tensors\n"
        "            )\n",
        ("tests/test_autograd.py", "no_route"),
    ),
    Mutant(
        "gradients that torch.compile passes over, of zero",
        RULES,
        "        if torch._C._are_functorch_transforms_active():\n            # It",
        "        if False:\n            # It",
        ("tests/reliability/test_compile.py", "silently_zero"),
    ),
    Mutant(
        "vmap over the backward, not refused",
        OPS,
        "            library.impl(name, refuse_vmap, batched)\n",
        "            pass\n",
        ("tests/test_autograd.py", "vmap"),
    ),
    Mutant(
        "a workspace that threads share",
        TORCH,
        "_shared = threading.local()\n",
        "_shared = type(threading)('shared')\n",
        ("tests/test_autograd.py", "threads"),
    ),
    Mutant(
        "autocast let into the operators",
        OPS,
        'library.impl(name, without_autocast, f"Autocast{device}")',
        "pass",
        ("tests/test_ops.py", "autocast"),
    ),
    Mutant(
        "a rank beyond the groups let through",
        CHECKS,
        "    least = min(in_features, out_features)\n",
        "    least = max(in_features, out_features)\n",
        ("tests/test_functional.py", "do_not_fit"),
    ),
    Mutant(
        "the planner fuses split",
        PLANNER,
        '    fusible = whole and problem.precision == "merged"\n',
        "    fusible = whole\n",
        ("tests/test_planner.py", "plan"),
    ),
    Mutant(
        "partials beyond their bound",
        f"{TRITON}/launch.py",
        "        spare = partial_bytes // (4 * max(1, r))",
        "        spare = 4 * partial_bytes // (4 * max(1, r))",
        ("tests/triton/test_launch.py", "splits"),
    ),
    Mutant(
        "kernel: the remainder of K dropped",
        f"{TRITON}/forward.py",
        "min(K, (split_k + 1) * part), BK):\n",
        "min(K // BK * BK, (split_k + 1) * part), BK):\n",
        ("tests/triton/test_forward.py", "every_shape"),
    ),
    Mutant(
        "kernel: the remainder of the tokens dropped",
        f"{TRITON}/grad_factors.py",
        "        for n in range(0, N, BN):\n",
        "        for n in range(0, N // BN * BN, BN):\n",
        ("tests/triton/test_grad_factors.py", "every_shape"),
    ),
    Mutant(
        "kernel: the remainder of O dropped",
        f"{TRITON}/grad_input.py",
        "min(O, (split_k + 1) * part), BO):\n",
        "min(O // BO * BO, (split_k + 1) * part), BO):\n",
        ("tests/triton/test_grad_input.py", "every_shape"),
    ),
    Mutant(
        "kernel: T rounded to 16 bits first",
        f"{TRITON}/tiles.py",
        "        return (b_w.to(tl.float32) * (constant + b_t)).to(dtype)\n",
        "        b_T = (constant + b_t).to(dtype).to(tl.float32)\n"
        "        return (b_w.to(tl.float32) * b_T).to(dtype)\n",
        ("tests/triton/test_weight.py", "rounded_first"),
    ),
    Mutant(
        "kernel: the wrong group at remainders",
        f"{TRITON}/tiles.py",
        "    return index * r // size\n",
        "    return (index * r + r // 2) // size\n",
        ("tests/triton/test_weight.py", "groups"),
    ),
    Mutant(
        "kernel: columns grouped as rows are",
        f"{TRITON}/tiles.py",
        "b_q = group_of(o_k, r, K)[:, None]",
        "b_q = group_of(o_k, r, O)[:, None]",
        ("tests/triton/test_grad_factors.py", "every_shape"),
    ),
    Mutant(
        "kernel: one group taken for a whole tile's",
        f"{TRITON}/launch.py",
        "    return r == 1 or size % (r * block) == 0\n",
        "    return r == 1 or size % block == 0\n",
        ("tests/triton/test_forward.py", "groups or every_shape"),
    ),
    Mutant(
        "kernel: the factor tile reads beyond the rank",
        f"{TRITON}/forward.py",
        "p_b, pid_o * BO, 0, O, r, stride_bo,",
        "p_b, pid_o * BO, 0, O, BR, stride_bo,",
        ("tests/triton/test_forward.py", "views"),
    ),
    Mutant(
        "kernel: a partial begun only once",
        f"{TRITON}/grad_factors.py",
        "b_Q, tile_o == 0, False)",
        "b_Q, tile_k == 0 and tile_o == 0, False)",
        ("tests/triton/test_grad_factors.py", "every_rank"),
    ),
    Mutant(
        "kernel: a chunk overwrites the one before",
        f"{TRITON}/grad_reduce.py",
        "b_Q, start == 0, False)",
        "b_Q, True, False)",
        ("tests/triton/test_grad_reduce.py", "any_chunks"),
    ),
    Mutant(
        "kernel: only the first partial counted",
        f"{TRITON}/partial_sums.py",
        "    return partials.select(dim, 0) if partials.shape[dim] == 1 else partials.sum(dim)\n",
        "    return partials.select(dim, 0)\n",
        ("tests/triton/test_grad_factors.py", "any_splits"),
    ),
    Mutant(
        "kernel: the bias dropped",
        f"{TRITON}/tiles.py",
        "    if HAS_BIAS:\n        acc += ",
        "    if HAS_BIAS:\n        acc += 0 * ",
        ("tests/triton/test_forward.py", "every_variant"),
    ),
    Mutant(
        "what is too large for the device is launched again",
        PLANNER,
        "        runs = device.holds(part, problem.row) and not device",
        "        runs = not device",
        ("tests/test_explain.py", "does_not_fit"),
    ),
    Mutant(
        "the factors of a transposed layer keep their places",
        LAYER,
        "hut_A=self.hut_B.t(), hut_B=self.hut_A.t()",
        "hut_A=self.hut_B.t().flip(1), hut_B=self.hut_A.t()",
        ("tests/triton/test_backend.py", "other_direction"),
    ),
    Mutant(
        "the staged path forgets split",
        f"{TRITON}/backend.py",
        'layer), layer.spec.precision == "split"\n',
        "layer), False\n",
        ("tests/triton/test_backend.py", "split"),
    ),
    Mutant(
        "kernel: a group's vector addressed in 32 bits",
        f"{TRITON}/tiles.py",
        "        o_a = p * stride_ar + o_k.to(tl.int64) * stride_ak\n",
        "        o_a = p * stride_ar + o_k * stride_ak\n",
        ("tests/reliability/test_limits.py", "widened or kernels_read"),
    ),
    Mutant(
        "kernel: a tile addressed in 32 bits",
        f"{TRITON}/tiles.py",
        "    o_columns = o_columns.to(tl.int64)\n    offsets",
        "    offsets",
        ("tests/reliability/test_limits.py", "widened or kernels_read"),
    ),
    Mutant(
        "the fake gives another shape",
        OPS,
        "    return x.new_empty((*x.shape[:-1], hut_B.shape[0]))\n",
        "    return x.new_empty((*x.shape[:-1], hut_A.shape[1]))\n",
        ("tests/reliability/test_compile.py", "one_graph_for_any"),
    ),
    Mutant(
        "a backward that cannot be traced",
        AUTOGRAD,
        "        d_x = next(grads) if need_x else None\n",
        "        torch._dynamo.graph_break()\n        d_x = next(grads) if need_x else None\n",
        ("tests/reliability/test_compile.py", "one_graph_for_any"),
    ),
    Mutant(
        "a tensor accepted for a number",
        CHECKS,
        "    if not isinstance(value, numbers.Real):\n",
        "    if not isinstance(value, (numbers.Real, Tensor)):\n",
        ("tests/reliability/test_hostile.py", "outside_float32"),
    ),
    Mutant(
        "sparse tensors let through",
        CHECKS,
        "            or tensor.layout is not torch.strided\n",
        "",
        ("tests/reliability/test_hostile.py", "not_dense"),
    ),
    Mutant(
        "a module for Linux alone imported",
        FUNCTIONAL,
        "import contextlib\n",
        "import contextlib\nimport fcntl\n",
        ("tests/reliability/test_imports.py", "linux"),
    ),
    Mutant(
        "triton imported by the package",
        FLOPS,
        "    if _COUNTER in sys.modules:\n",
        "    if True:\n",
        ("tests/reliability/test_imports.py", "touches"),
    ),
    Mutant(
        "operations: G's product not counted",
        FLOPS,
        "        operations += _product(grad, sizes) + thin * ",
        "        operations += thin * ",
        ("tests/reliability/test_flops.py", "step"),
    ),
    Mutant(
        "operations: formulas registered only if the counter is there",
        FLOPS,
        "        sys.meta_path.insert(0, _AfterImport())\n",
        "        pass\n",
        ("tests/reliability/test_flops.py", "order"),
    ),
    Mutant(
        "adapter: the checksum not compared",
        ADAPTERS,
        '    if metadata.get("sha256") != _checksum(metadata["layers"], tensors):\n',
        "    if False:\n",
        ("tests/reliability/test_hostile.py", "flipped"),
    ),
    Mutant(
        "adapter: the checksum without the factors' bytes",
        ADAPTERS,
        "        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)\n",
        "",
        ("tests/reliability/test_hostile.py", "flipped"),
    ),
    Mutant(
        "adapter: a rank that the factors do not have",
        ADAPTERS,
        "        if not _describes(options, name, tensors):\n",
        "        if False:\n",
        ("tests/reliability/test_hostile.py", "lies"),
    ),
    Mutant(
        "adapter: a device opened for reading",
        ADAPTERS,
        "    if Path(file).exists() and not Path(file).is_file():\n",
        "    if Path(file).is_dir():\n",
        ("tests/reliability/test_hostile.py", "device"),
    ),
    Mutant(
        "adapter: written before all is checked",
        ADAPTERS,
        "        _check_fits(name, tensors[name], factor)\n",
        "        _check_fits(name, tensors[name], factor)\n        factor.copy_(tensors[name])\n",
        ("tests/test_adapter_file.py", "damaged or another_model"),
    ),
    Mutant(
        "adapter: options that exhaust the parser",
        ADAPTERS,
        "TypeError, AttributeError, RecursionError):\n",
        "TypeError, AttributeError):\n",
        ("tests/reliability/test_hostile.py", "exhaust"),
    ),
    Mutant(
        "tensor parallel: a replicated factor's gradient not summed",
        DISTRIBUTED,
        ".full_tensor(grad_placements=(Partial(),))",
        ".full_tensor()",
        ("tests/distributed/test_tensor_parallel.py", "output_and_gradients"),
    ),
    Mutant(
        "tensor parallel: an input's gradient not summed",
        DISTRIBUTED,
        "part = (Partial(),) if self.local_input.is_replicate() else None\n",
        "part = None\n",
        ("tests/distributed/test_tensor_parallel.py", "output_and_gradients"),
    ),
    Mutant(
        "tensor parallel: bias and beta on every rank",
        DISTRIBUTED,
        "        if self.mesh.get_local_rank() == 0:\n",
        "        if True:\n",
        ("tests/distributed/test_tensor_parallel.py", "output_and_gradients"),
    ),
    Mutant(
        "tensor parallel: every shard reads the first groups",
        DISTRIBUTED,
        "    return repeated.narrow(dim, start - first * size, r)\n",
        "    return repeated.narrow(dim, 0, r)\n",
        ("tests/distributed/test_tensor_parallel.py", "groups_of_a_shard"),
    ),
    Mutant(
        "tensor parallel: a Conv1D cut along its other side",
        DISTRIBUTED,
        "dim = 1 - self.layer_class.sharded",
        "dim = self.layer_class.sharded",
        ("tests/distributed/test_tensor_parallel.py", "every_kind"),
    ),
    Mutant(
        "tensor parallel: a parameter that FSDP2 sharded is read",
        DISTRIBUTED,
        "isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:\n",
        "isinstance(parameter, DTensor):\n",
        ("tests/distributed/test_tensor_parallel.py", "within_fsdp"),
    ),
    Mutant(
        "csrc: sums of columns begun again in each block of rows",
        f"{CSRC}/reduce.h",
        "  const bool first = s == 0 || a.first_row == 0;\n",
        "  const bool first = true;\n",
        ("tests/test_cuda.py", "several_blocks"),
    ),
    Mutant(
        "csrc: no barrier between loading H0 and summing it",
        f"{CSRC}/reduce.h",
        "      block.sync();\n      const Shared H0 = H0_of(shared, s);\n      const Shared left",
        "      const Shared H0 = H0_of(shared, s);\n      const Shared left",
        ("tests/test_cuda.py", "no_thread_reads"),
    ),
    Mutant(
        "csrc: no barrier before the next depth of r is staged",
        f"{CSRC}/weight.h",
        "      block.sync();\n      stage<kDepth>(block, shared.left[0]",
        "      stage<kDepth>(block, shared.left[0]",
        ("tests/test_cuda.py", "no_thread_reads"),
    ),
    Mutant(
        "csrc: a tensor core's operand from the neighboring column",
        f"{CSRC}/tile.h",
        " + v + lane.g % 2;",
        " + v + 1 - lane.g % 2;",
        ("tests/test_cuda.py", "a_layer_and"),
    ),
    Mutant(
        "csrc: groups walked one index too long",
        f"{CSRC}/multiplier.h",
        "    if (rest_ >= size_) {\n",
        "    if (rest_ > size_) {\n",
        ("tests/test_cuda.py", "a_layer_and"),
    ),
    Mutant(
        "csrc: gamma forgotten in the reduction",
        f"{CSRC}/reduction.h",
        "{ return gamma * (G * weight); }",
        "{ return G * weight; }",
        ("tests/test_cuda.py", "a_layer_and"),
    ),
    Mutant(
        "csrc: only the first split's partial sums added",
        f"{CSRC}/finish.h",
        "split < a.splits[s]; ++split",
        "split < 1; ++split",
        ("tests/test_cuda.py", "several_blocks"),
    ),
    Mutant(
        "csrc: each block of rows of G times the first rows of W0",
        f"{CSRC}/ops.cpp",
        "reduce.weight = layer.weight(row);",
        "reduce.weight = layer.weight(0);",
        ("tests/test_cuda.py", "several_blocks"),
    ),
    Mutant(
        "csrc: sixteen bytes at a time from any address",
        f"{CSRC}/ops.cpp",
        "column_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&",
        "column_stride == 1 &&",
        ("tests/test_cuda.py", "strides_and"),
    ),
    Mutant(
        "tensor parallel: infinity times 0",
        DISTRIBUTED,
        "whole.masked_fill(torch.ones_like(whole, dtype=torch.bool), 0.0)",
        "whole * 0",
        ("tests/distributed/test_tensor_parallel.py", "infinite"),
    ),
    Mutant(
        "adapter: a replica's prefix kept",
        ADAPTERS,
        "        elif isinstance(model, _REPLICAS):\n",
        "        elif False:\n",
        ("tests/test_adapter_file.py", "wrapped_and_plain"),
    ),
    Mutant(
        "layer: alpha not divided by the rank",
        NN,
        "else self.alpha / self.r\n",
        "else self.alpha\n",
        ("tests/test_nn.py", "alpha_over_r"),
    ),
    Mutant(
        "layer: dropout on the whole product",
        NN,
        "    return y + (rest if gamma is None else (gamma * rest).to(y.dtype))\n",
        "    return y\n",
        ("tests/test_nn.py", "dropout_applies"),
    ),
    Mutant(
        "layer: a Conv1D merged in the other layout",
        NN,
        "        return merged.t().contiguous() if self.fan_in_fan_out else merged\n",
        "        return merged\n",
        ("tests/test_nn.py", "conv1d"),
    ),
    Mutant(
        "layer: gamma forgotten in the merged bias",
        NN,
        "effective_bias(self.bias, self.gamma, self.beta, ",
        "effective_bias(self.bias, None, self.beta, ",
        ("tests/test_nn.py", "merged_layer"),
    ),
    Mutant(
        "dispatch: float64 looked for in x alone",
        DISPATCH,
        "    if _any_float64(tensors):\n        raise",
        "    if _any_float64(tensors[:1]):\n        raise",
        ("tests/test_dispatch.py", "float64_is"),
    ),
    Mutant(
        "versions: what led up to a fix is trusted",
        VERSIONS,
        "        unfinished is not None and ",
        "        False and ",
        ("tests/test_versions.py", "its_versions"),
    ),
    Mutant(
        "PEFT: scaling forgotten in the product",
        f"{PEFT}/layer.py",
        "            scaling=self.scaling[name],\n            gamma=_entry(self.hut_gamma, name),\n"
        "            beta",
        "            gamma=_entry(self.hut_gamma, name),\n            beta",
        ("tests/integrations/test_peft_tuner.py", "test_output"),
    ),
    Mutant(
        "PEFT: dropout on the whole product",
        f"{PEFT}/layer.py",
        "            x,\n            dropout(x),\n",
        "            dropout(x),\n            dropout(x),\n",
        ("tests/integrations/test_peft_tuner.py", "dropout_acts"),
    ),
    Mutant(
        "PEFT: several adapters merged with the base counted twice",
        f"{PEFT}/layer.py",
        "(part if origin is None else part - origin)\n",
        "part\n",
        ("tests/integrations/test_peft_tuner.py", "merge"),
    ),
    Mutant(
        "PEFT: the layer of index 0 for no index",
        f"{PEFT}/config.py",
        "if self.layers_pattern and self.layers_to_transform is None:\n",
        "if self.layers_pattern and not self.layers_to_transform:\n",
        ("tests/integrations/test_peft_tuner.py", "layers_to_transform"),
    ),
    Mutant(
        "an expert's offset off by one",
        GROUPED_BACKEND,
        "    found = [(n, slice(*span)) for",
        "    found = [(n, slice(max(span[0] - 1, 0), span[1])) for",
        ("tests/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "an expert without rows skipped where experts are counted",
        GROUPED_BACKEND,
        "for n, span in enumerate(pairwise(ends)) if span[0] < span[1]]\n",
        "for n, span in enumerate(pairwise(sorted({*ends}))) if span[0] < span[1]]\n",
        ("tests/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "a transposed stack misread",
        GROUPED,
        "        weight = weight.mT\n",
        "        weight = weight.reshape(len(weight), *weight.shape[:0:-1])\n",
        ("tests/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "the rows of no expert left unwritten",
        GROUPED_BACKEND,
        "    y[ends[-1] :] = 0\n",
        "",
        ("tests/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "kernel: an expert's place in its group taken for its number",
        f"{TRITON}/tiles.py",
        "return tl.load(p_experts + place), place.to(tl.int64), pid % programs\n",
        "return place.to(tl.int64), place.to(tl.int64), pid % programs\n",
        ("tests/triton/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "kernel: the first expert's gamma for all",
        f"{TRITON}/weight.py",
        "        p_gamma += expert * O\n",
        "",
        ("tests/triton/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "kernel: all experts' partials in the first one's place",
        f"{TRITON}/grad_reduce.py",
        "        p_P += place * k_splits * O * r\n",
        "",
        ("tests/triton/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "an expert without rows staged in another's place",
        GROUPED_BACKEND,
        "    numbers = torch.argsort(idle.int(), stable=True)[: len(found)]\n",
        "    numbers = torch.arange(len(idle), device=idle.device)[: len(found)]\n",
        ("tests/triton/test_grouped.py", "equals_float64"),
    ),
    Mutant(
        "every tile of W by the first rows of a rounded B",
        TORCH,
        "linear_mul(take(multiplier.left, rows), multiplier",
        "linear_mul(multiplier.left[: len(W0)], multiplier",
        ("tests/test_torch_backend.py", "where_the_cpu_multiplies_it"),
    ),
    Mutant(
        "every tile of H0 by the first rows of W0",
        TORCH,
        "            sums.add(rows, H0.mul_(_base_rows(weight, rows, x_dtype)))\n",
        "            sums.add(rows, H0.mul_(_base_rows(weight, tiles[0], x_dtype)[: len(H0)]))\n",
        ("tests/test_torch_backend.py", "where_the_cpu_multiplies_it"),
    ),
    Mutant(
        "the last columns of a widened W dropped",
        ONEDNN,
        "    for first in range(0, W.shape[1], step):\n",
        "    for first in range(0, W.shape[1] - W.shape[1] % step, step):\n",
        ("tests/test_torch_backend.py", "where_the_cpu_is_fast"),
    ),
    Mutant(
        "G multiplied in bf16 where the CPU has no instructions for it",
        TORCH,
        " or onednn.is_widened(x) else x_dtype",
        " else x_dtype",
        ("tests/test_torch_backend.py", "where_the_cpu_is_fast"),
    ),
    Mutant(
        "experts' rows combined in the order of experts",
        EXPERTS,
        "    place[order] = torch.arange(len(order), device=order.device)\n",
        "    place[:] = order\n",
        ("tests/integrations/test_experts.py", "merged_weights"),
    ),
    Mutant(
        "a later choice of implementation silences the experts' adapter",
        EXPERTS,
        "def _keep_chosen(experts: nn.Module, args: tuple) -> None:\n    choose(experts)\n",
        "def _keep_chosen(experts: nn.Module, args: tuple) -> None:\n    pass\n",
        ("tests/integrations/test_experts.py", "made_later"),
    ),
    Mutant(
        "the direct form's T from factors of 16 bits",
        TORCH,
        "        spec.constant == 1.0\n        and layer.gamma is None\n",
        "        layer.gamma is None\n",
        ("tests/test_grouped.py", "rounded_to_16"),
    ),
    Mutant(
        "a wrong entry in NF4's table",
        FOUR_BIT,
        "-0.5250730514526367",
        "-0.5250740514526367",
        ("tests/formats/test_four_bit.py", "tables_are"),
    ),
    Mutant(
        "the two codes of a byte swapped",
        FOUR_BIT,
        "    pairs = torch.stack([table[byte >> 4], table[byte & 15]], 1)\n",
        "    pairs = torch.stack([table[byte & 15], table[byte >> 4]], 1)\n",
        ("tests/formats/test_four_bit.py", "where_it_is_right"),
    ),
    Mutant(
        "the absmax of the block before",
        FOUR_BIT,
        "        torch.mul(blocks, self.absmax(first, last)[:, None], out=blocks)\n",
        "        torch.mul(blocks, self.absmax(first, last).roll(1)[:, None], out=blocks)\n",
        ("tests/formats/test_four_bit.py", "where_it_is_right"),
    ),
    Mutant(
        "rows that begin within a block read from its start",
        FOUR_BIT,
        "        return values[begin - start : end - start].view(-1, columns)\n",
        "        return values[: end - begin].view(-1, columns)\n",
        ("tests/formats/test_four_bit.py", "any_rows"),
    ),
    Mutant(
        "the offset of a quantized absmax forgotten",
        FOUR_BIT,
        "        values += offset\n",
        "",
        ("tests/formats/test_four_bit.py", "where_it_is_right"),
    ),
    Mutant(
        "the absmax of absmax taken from the first block on",
        FOUR_BIT,
        "        values *= absmax[start:stop].repeat_interleave(self.nested)[: len(values)]\n",
        "        values *= absmax[: stop - start].repeat_interleave(self.nested)[: len(values)]\n",
        ("tests/formats/test_four_bit.py", "where_it_is_right or any_rows"),
    ),
    Mutant(
        "a repacked absmax read as it lies",
        FOUR_BIT,
        "    absmax = state.absmax.t() if state.absmax.ndim > 1 else state.absmax\n",
        "    absmax = state.absmax\n",
        ("tests/formats/test_four_bit.py", "repacked"),
    ),
    Mutant(
        "the order of codes by the mark of a quant_state that they share",
        FOUR_BIT,
        "    if weight.shape != (out_features, in_features // 2) or in_features <= 2:\n",
        "    if not getattr(state, 'packing_format_for_cpu', False):\n",
        ("tests/formats/test_four_bit.py", "shares"),
    ),
    Mutant(
        "codes loaded without what belongs to them",
        NN,
        '        if absent and prefix + "weight" in state_dict:\n',
        "        if False:\n",
        ("tests/formats/test_layers.py", "belongs_to_them"),
    ),
    Mutant(
        "int8 over 128",
        INT8,
        "        return values.mul_(RECIPROCAL) if self.over_127 else values\n",
        "        return values.mul_(1 / 128) if self.over_127 else values\n",
        ("tests/formats/test_int8.py", "int8_params"),
    ),
    Mutant(
        "zero points forgotten",
        INT8,
        "            values -= self.scales[1][rows, None]\n",
        "            pass\n",
        ("tests/formats/test_int8.py", "zero_points"),
    ),
    Mutant(
        "a quantized weight's size measured on its codes",
        NN,
        "        dense = formats.dense(weight, torch.float32)\n",
        "        dense = weight.detach().float()\n",
        ("tests/formats/test_layers.py", "rates_and_scales"),
    ),
    Mutant(
        "kernel: the two codes of a byte swapped",
        f"{TRITON}/stored.py",
        "        q = tl.where(index % 2 == 0, q >> 4, q & 15)\n",
        "        q = tl.where(index % 2 == 1, q >> 4, q & 15)\n",
        ("tests/triton/test_stored_weight.py", "dequantized"),
    ),
    Mutant(
        "kernel: the offset of a quantized absmax forgotten",
        f"{TRITON}/stored.py",
        "            return value * scale + offset\n",
        "            return value * scale\n",
        ("tests/triton/test_stored_weight.py", "dequantized"),
    ),
    Mutant(
        "kernel: G reduced over the codes of the first columns",
        f"{TRITON}/grad_reduce.py",
        "                        k_split * tiles_k + tile_k, m_o, K,",
        "                        tile_k, m_o, K,",
        ("tests/triton/test_stored_weight.py", "gradients"),
    ),
    Mutant(
        "kernel: a fused forward over the codes of the first columns",
        f"{TRITON}/forward.py",
        "p_table, o_o, k // BK, m_o, K,",
        "p_table, o_o, 0, m_o, K,",
        ("tests/triton/test_stored_weight.py", "fused_forward"),
    ),
    Mutant(
        "doubly quantized weights fused, with loads that nothing overlaps",
        "hut_kernels/auto.py",
        "        whole = isinstance(tensor, FourBit) and tensor.in_rows and not tensor.nested\n",
        "        whole = isinstance(tensor, FourBit) and tensor.in_rows\n",
        ("tests/triton/test_stored_weight.py", "share_no_absmax"),
    ),
    Mutant(
        "a dense copy of a quantized weight in the backward",
        f"{TRITON}/backend.py",
        '    kernel = "stored_reduce" if isinstance(layer.weight, Stored) else "grad_reduce"\n',
        "    if isinstance(layer.weight, Stored):\n"
        "        W0 = dequantize(layer.weight, x.dtype, plan.device.arch)\n"
        "        layer = layer._replace(weight=W0)\n"
        '    kernel = "grad_reduce"\n',
        ("tests/triton/test_stored_weight.py", "no_dense"),
    ),
)


def copy_to(folder: Path) -> None:
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)


def apply(mutant: Mutant, folder: Path) -> None:
    """Plants the defect.

    Raises:
        ValueError: The old text does not stand in the file exactly once.
    """
    path = folder / mutant.file
    text = path.read_text()
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.file} holds the old text {found} times, not once")
    path.write_text(text.replace(mutant.old, mutant.new))


def run_tests(folder: Path, files: list[str], expression: str) -> tuple[int, str]:
    """The exit status of pytest in the folder, and its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    if files[0].startswith("tests/triton"):
        environment["TRITON_INTERPRET"] = "1"
    where = "import hut_kernels, sys; sys.exit(not hut_kernels.__file__.startswith(sys.argv[1]))"
    command = [sys.executable, "-c", where, str(folder)]
    if subprocess.run(command, cwd=folder, env=environment, check=False).returncode:
        return -1, "ERROR another hut_kernels is imported than the copy's"
    command = [sys.executable, "-m", "pytest", *files, "-k", expression, "-x", "-q", "--tb=no"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def verdict(status: int, output: str) -> tuple[str, str]:
    """The verdict on a mutant, and the test that saw it or the reason."""
    if status == 1:
        failed = re.search(r"^FAILED \S*/(\S+)", output, re.MULTILINE)
        return "caught", failed.group(1) if failed else "?"
    if status == 0:
        return "SURVIVED", ""
    lines = [line for line in output.splitlines() if "rror" in line or "no tests" in line]
    return "ERROR", lines[-1] if lines else f"pytest ended with {status}"


def try_mutant(mutant: Mutant) -> tuple[str, str, float]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_to(folder)
        try:
            apply(mutant, folder)
        except ValueError as error:
            return "STALE", str(error), 0.0
        file, expression = mutant.tests
        result, reason = verdict(*run_tests(folder, [file], expression))
    return result, reason, time.monotonic() - begun


def unmutated(mutants: list[Mutant]) -> list[str]:
    """The groups of tests that fail without a defect; one group interprets, the other does not."""
    failing = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_to(folder)
        for interpreted in (False, True):
            tests = [
                m.tests for m in mutants if m.tests[0].startswith("tests/triton") == interpreted
            ]
            if not tests:
                continue
            files = sorted({file for file, _ in tests})
            expression = " or ".join(dict.fromkeys(expression for _, expression in tests))
            status, output = run_tests(folder, files, expression)
            if status:
                failing.append(f"without a defect, {', '.join(files)}: {verdict(status, output)}")
    return failing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at a time")
    parser.add_argument("--only", default="", help="mutants whose name or file holds this text")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if args.only in m.name or args.only in m.file]
    if not mutants:
        parser.error(f"no mutant's name or file holds {args.only!r}")
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name:48}{mutant.file}")
        return 0
    begun = time.monotonic()
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        baseline = pool.submit(unmutated, mutants)
        for mutant, tried in zip(mutants, pool.map(try_mutant, mutants), strict=True):
            result, reason, seconds = tried
            survivors += result != "caught"
            print(f"{result:10}{mutant.name:48}{seconds:5.1f} s  {reason[:90]}", flush=True)
        failing = baseline.result()
    for line in failing:
        print(line)
    print(f"{len(mutants) - survivors} of {len(mutants)} caught, {time.monotonic() - begun:.0f} s")
    return int(bool(survivors or failing))


if __name__ == "__main__":
    sys.exit(main())
