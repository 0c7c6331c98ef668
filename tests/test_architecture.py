"""The import graph of the package is the picture of docs/architecture.md."""

import ast
import graphlib
import itertools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hut_kernels"
# From the top of the picture down, one way for a call. Without a circle, nothing goes back up.
STAIRCASE = (
    "integrations.peft", "adapters", "nn", "functional", "autograd", "ops", "auto",
    "triton.backend", "triton.forward", "triton.launch", "layer",
)  # fmt: skip


def modules():
    """Files by dotted name below the package; a folder is its __init__.py."""
    named = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imports(name, file, known):
    """The modules that a file imports from its own package, in its functions too."""
    folder = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1] if node.level > 1 else folder
            base = [part for part in (*above, *(node.module or "").split(".")) if part]
            for alias in node.names:
                one = ".".join((*base, alias.name))
                yield one if one in known else ".".join(base)


def graph():
    named = modules()
    return {name: {*imports(name, file, named)} - {name} for name, file in named.items()}


def test_no_import_goes_round_in_a_circle():
    edges = graph()
    assert {*itertools.chain(*edges.values())} <= {*edges}
    order = [*graphlib.TopologicalSorter(edges).static_order()]  # CycleError names the circle
    assert len(order) == len(edges) > 30


def test_no_import_goes_up_the_staircase():
    edges = graph()

    def below(name):
        return {name}.union(*map(below, edges[name]))

    for upper, lower in itertools.pairwise(STAIRCASE):
        assert lower in below(upper), f"{upper} does not reach {lower}"
        assert upper not in below(lower), f"{lower} imports {upper}"
    # The oracle stands alone: no backend's code is in it.
    assert edges["definition"] == {"layer"}


def test_every_file_is_in_the_table():
    text = (ROOT / "docs/architecture.md").read_text()
    for file in PACKAGE.glob("[!_]*"):
        if file.suffix == ".py":
            assert f"`{file.name}`" in text, file.name
        elif file.is_dir():
            assert f"`{file.name}/" in text, file.name
