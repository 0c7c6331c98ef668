"""Hypothesis strategies that draw layers: what the property tests run over."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from .references import LAYOUTS, Case, laid_out, make


def examples(count: int) -> Any:
    """`count` examples of a property, times HUT_EXAMPLES."""
    return settings(max_examples=count * int(os.environ.get("HUT_EXAMPLES", "1")))


SIZES = st.one_of(st.sampled_from([0, 1, 2, 16, 17]), st.integers(0, 40))
VECTORS = st.lists(st.sampled_from(["bias", "gamma", "beta"]), unique=True).map(" ".join)


@st.composite
def forms(draw: Any, K: int, O: int, max_rank: int = 12) -> dict[str, Any]:
    """A transform with the options and ranks that it allows."""
    if min(K, O) > 0 and draw(st.booleans()):
        return {"transform": "two_sided", "r": draw(st.integers(1, min(K, O, max_rank)))}
    return {
        "offset": draw(st.sampled_from([0.0, 1.0])),
        "scaling": draw(st.sampled_from([1.0, 0.75, 2.0])),
        "r": draw(st.integers(1, max_rank)),
    }


@st.composite
def cases(
    draw: Any,
    dtypes: tuple[torch.dtype, ...],
    sizes: Any = SIZES,
    leading: bool = True,
    max_rank: int = 12,
) -> Case:
    """Any layer at all: shapes with 0 and 1, types, options, strides, expanded gradients."""
    dtype = draw(st.sampled_from(dtypes))
    N, K, O = (draw(sizes) for _ in range(3))
    if dtype == torch.bfloat16:
        # The limits are for norms: all roundings of a single element may be at their worst at once.
        K, O = (3 if size == 1 else size for size in (K, O))
    shape: Any = (N,)
    if leading:
        shape = draw(st.sampled_from([(N,), (), (N, 2), (3, 1, N)]))
    form = draw(forms(K, O, max_rank))
    precision = draw(st.sampled_from(["merged", "merged", "split"]))
    if precision == "split" and form.get("offset") == 0:
        form["scaling"] = 2.0  # below 1 the two products of split would cancel
    narrow = tuple(d for d in dtypes if d != torch.float64)
    case = make(
        shape,
        K,
        O,
        form.pop("r"),
        dtype=dtype,
        weight_dtype=draw(st.sampled_from((dtype, *narrow))),
        factor_dtype=draw(st.sampled_from((torch.float32, dtype, *narrow))),
        vectors=draw(VECTORS),
        precision=precision,
        seed=draw(st.integers(0, 2**20)),
        **form,
    )
    grad = draw(st.sampled_from([None, None, "expanded"])) if case.grad.dim() > 1 else None
    return laid_out(case, draw(st.sampled_from(LAYOUTS)), grad)
