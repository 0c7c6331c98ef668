"""The examples in public docstrings run, and every public function and class has one."""

import doctest

import pytest

import hut_kernels

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PUBLIC = {*hut_kernels.__all__} - {"PAPER", "HUTBackendError"}


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


@pytest.mark.parametrize("name", ["HUTConfig", "HUTModel", "HUTLayer"])
def test_the_example_of_a_peft_class_runs(name):
    pytest.importorskip("peft")
    from hut_kernels.integrations import peft

    public = getattr(peft, name)
    assert "The method is described in https://arxiv.org/abs/2409.13501" in public.__doc__
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(recurse=False).find(public, name, globs={}):
        assert test.examples
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
