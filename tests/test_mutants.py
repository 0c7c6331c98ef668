"""The planted defects of `make mutants` still fit the code, so that none of them is skipped."""

import re

import pytest

from . import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_the_defect_can_be_planted(mutant):
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.old) == 1
    file, expression = mutant.tests
    words = set(re.findall(r"[\w.\[\]-]+", expression)) - {"and", "or", "not"}
    text = (mutants.ROOT / file).read_text()
    assert not [word for word in words if word not in text]  # of tests that are no more


def test_there_are_at_least_thirty():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 30
