#!/usr/bin/env bash
# Triton 3.7.1: of two chained products on mma.sync the first is made several times over.
#
# acc += tl.dot(g, w * tl.dot(b, a)) with eight warps, tiles g [256, 32], w [32, 128] and rank 16: the
# warps are laid along the 256 rows of the large product and the small one takes the same layout, but
# has 32 rows, enough for two of them. The other six make the same tile: 80 mma.sync a warp in the
# loop, of which 64 are the large product and 4 the small one's share. With tl.trans twice around an
# operation that does nothing, which changes no value, the chain is not seen: 68. At rank 64 it is 128
# and 80. (Where g and w also share an index that is computed in the loop, the chain is seen by that.)
# Nobody would look for the 1.6-fold cost of a kernel in a transpose that is not there.
#
# No GPU is needed: the kernels are compiled for sm_80, and their PTX is counted.
# Seen: "rank 16: 80 products a warp in the loop, 68 across a transpose" and so on, exit status 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet triton==3.7.1

cat > "$work/check.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(p_g, p_w, p_a, p_b, p_out, steps, R: tl.constexpr, APART: tl.constexpr):
    rows, columns, inner = tl.arange(0, 256), tl.arange(0, 128), tl.arange(0, 32)
    rank = tl.arange(0, R)
    a = tl.load(p_a + rank[:, None] * 128 + columns[None, :])
    p_g += rows[:, None] * 4096 + inner[None, :]
    p_w += inner[:, None] * 128 + columns[None, :]
    p_b += inner[:, None] * R + rank[None, :]
    acc = tl.zeros((256, 128), tl.float32)
    for _ in range(steps):
        g, w, b = tl.load(p_g), tl.load(p_w), tl.load(p_b)
        p_g += 32
        p_w += 32 * 128
        p_b += 32 * R
        modulated = w * tl.dot(b, a).to(tl.bfloat16)
        if APART:
            same = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tl.trans(modulated)],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )
            modulated = tl.trans(same)
        acc = tl.dot(g, modulated, acc)
    tl.store(p_out + rows[:, None] * 128 + columns[None, :], acc)


def products(rank, apart):
    pointers = {f"p_{name}": "*bf16" for name in "gwab"}
    signature = {**pointers, "p_out": "*fp32", "steps": "i32", "R": "constexpr", "APART": "constexpr"}
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(5)}
    source = ASTSource(kernel, signature, {"R": rank, "APART": apart}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8})
    return len(re.findall(r"mma\.sync", compiled.asm["ptx"]))


print("Triton", triton.__version__)
seen = {}
for rank in (16, 64):
    seen[rank] = products(rank, False), products(rank, True)
    together, apart = seen[rank]
    print(f"rank {rank}: {together} products a warp in the loop, {apart} across a transpose")
assert seen == {16: (80, 68), 64: (128, 80)}, "the behavior has changed"
PYTHON
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/check.py"
