"""Races that Triton compiles into kernels for sm_100, by version: a mended Triton is noticed.

Both are races by PTX's rules, found here; nobody has seen these kernels on such a device
(docs/reliability.md). Where a version that is expected to race does not, or one that is not does,
the test fails: then `hut_kernels/versions.py` has something to learn, too.
"""

import pytest
import triton

from hut_kernels.versions import release

from . import Fault, cases
from .cases import Call

pytestmark = pytest.mark.ptx

# The loop's operand is refilled before the product that reads it is waited for.
REFILLED = "write where a product under way still reads"
# What cp.async brought reaches a product without a proxy fence between.
UNFENCED = "a product reads what threads wrote, without a proxy fence between"
RACES = [
    (Call("grad_factors", "tf32", 300, 240, 240), REFILLED, "none yet"),
    (Call("forward", "tf32", 150, 400, 112), UNFENCED, "3.9.0"),
    (Call("forward", "fp16", 45, 400, 112, 128), UNFENCED, "3.9.0"),
    (Call("grad_input", "fp16", 45, 240, 368), UNFENCED, "3.9.0"),
    (Call("grad_input", "tf32", 45, 240, 368), UNFENCED, "3.9.0"),
    # In bf16 only where T is made of float32 factors.
    (Call("grad_input", "bf16", 45, 240, 368, options={"offset": 0.0}), UNFENCED, "3.9.0"),
]


@pytest.mark.parametrize(("call", "race", "fixed"), RACES, ids=[c.name for c, *_ in RACES])
def test_a_kernel_races_until_triton_is_mended(call, race, fixed):
    if fixed == "none yet" or release(triton.__version__) < release(fixed):
        with pytest.raises(Fault, match=race):
            cases.run(call, 100)
    else:
        cases.run(call, 100)
