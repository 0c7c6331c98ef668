"""Known miscompiles of patterns that the kernels use: is their machine code free of them?

On sm_90 a product may take its left operand from registers, and runs on while the program does.
Assemblers before CUDA 13.3 (those of Triton up to 3.8) can let a later instruction overwrite these
registers too soon (triton-lang/triton#9433, #11781). Where that showed in a kernel here, its rows
would have to leave the tables, and its layers take the staged path.
"""

import re
import tempfile
from pathlib import Path

import pytest

from hut_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to read from")
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tools import gate

_PRODUCT = re.compile(r"HGMMA\S*\s+R\d+,\s*R(\d+)")
_WRITE = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s+R(\d+)")
_WIDTHS = {".64": 2, ".128": 4}


def overwritten(code):
    """Register operands of products, and those that are written before the product is waited for.

    Returns:
        How many products take registers, and the offending pairs of instructions.
    """
    products, found = 0, []
    for number, line in enumerate(code):
        if not (product := _PRODUCT.search(line)):
            continue
        products += 1
        operand = set(range(int(product[1]), int(product[1]) + 4))
        for later in code[number + 1 :]:
            if re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x0\b|\b(BRA|EXIT)\b", later):
                break
            write = _WRITE.match(later)
            if write is None or later.lstrip("@!UP0123456789T ").startswith(("HGMMA", "ST", "RED")):
                continue
            width = max((n for end, n in _WIDTHS.items() if end in write[1]), default=1)
            if operand & set(range(int(write[2]), int(write[2]) + width)):
                found.append((line, later))
                break
    return products, found


def test_an_operand_overwritten_too_soon_is_found():
    hazard = ["HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4]", "MOV R6, R9"]
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert overwritten(hazard) == (1, [tuple(hazard)])
    assert overwritten([hazard[0], "WARPGROUP.DEPBAR.LE gsb0, 0x1", hazard[1]])[1]
    assert overwritten([hazard[0], "LDS.128 R4, [R9]"])[1]
    assert overwritten([hazard[0], wait, hazard[1]]) == (1, [])
    assert overwritten([hazard[0], "MOV R8, R9", "STS [R4], R6", wait]) == (1, [])


@pytest.mark.parametrize("kernel", gate.PRODUCTS)
def test_no_operand_in_registers_is_overwritten_before_its_product_is_done(kernel):
    products = 0
    for config in gate.configurations(["sm_90"], [kernel]):
        if config.r != 16 or config.dtype not in ("bf16", "tf32"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(gate.compile_config(config).asm["cubin"])
            code = gate._instructions(gate._run("nvdisasm", "-c", file)).lines
        count, found = overwritten(code)
        products += count
        assert not found, (config.name, found[:3])
    assert products, "no product takes registers any more: this file has nothing to watch"
