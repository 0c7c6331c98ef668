"""The groups of processes that the tests of this folder share."""

import pytest

from tests.distributed.pool import Group

FOUR = pytest.param(4, marks=pytest.mark.dist)


# Of session scope, so that pytest runs all tests on one group before it starts the next.
@pytest.fixture(scope="session", params=[2, FOUR], ids=lambda world: f"{world}_ranks")
def ranks(request):
    group = Group(request.param)
    yield group
    group.close()
