"""The examples in public docstrings run, and every public function and class has one."""

import ast
import doctest
from pathlib import Path

import pytest
import torch.distributed as dist

import hut_kernels
from hut_kernels import distributed

ROOT = Path(__file__).resolve().parent.parent

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PUBLIC = {*hut_kernels.__all__} - {"PAPER", "HUTBackendError"}
SOURCE = "The method is described in https://arxiv.org/abs/2409.13501; its residual form is HiRA"
QUESTIONS = ("What", "Whether", "Who", "Whose", "Which", "How", "Where", "When", "Why")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_example_runs(name):
    public = getattr(hut_kernels, name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    tests = doctest.DocTestFinder().find(public, name)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    # An adapter file is written, described and read in one example.
    elsewhere = name in ("load_adapter", "adapter_options")
    assert elsewhere == ("`save_adapter` has an example" in public.__doc__)
    assert elsewhere or any(test.examples for test in tests)


@pytest.mark.parametrize(
    "name", ["HUTConfig", "HUTModel", "HUTLayer", "HiraReport", "ConvertedAdapter"]
)
def test_the_example_of_a_peft_class_runs(name):
    pytest.importorskip("peft")
    from hut_kernels.integrations import peft

    run_the_example_of_a_class(getattr(peft, name), name)


@pytest.mark.parametrize("name", distributed.__all__)
def test_the_example_of_a_parallel_style_runs(name):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run_the_example_of_a_class(getattr(distributed, name), name)
    finally:
        dist.destroy_process_group()


def run_the_example_of_a_class(public, name):
    assert SOURCE in public.__doc__
    assert "\n    Examples:\n" in public.__doc__
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(recurse=False).find(public, name, globs={}):
        assert test.examples
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("folder", ["hut_kernels", "tools", "benchmarks", "examples", "tests"])
def test_no_docstring_begins_as_a_question(folder):
    first_words = {}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    place = f"{file.relative_to(ROOT)}:{node.body[0].lineno}"
                    first_words[place] = text.split(maxsplit=1)[0].strip("`\"',:;")
    assert len(first_words) > 5
    assert [place for place, word in first_words.items() if word in QUESTIONS] == []
