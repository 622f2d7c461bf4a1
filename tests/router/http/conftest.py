"""A front end over a fake service, for each test."""

import pytest

from tests.router.http.fake_service import FakeService
from tests.router.http.front_thread import FrontThread


@pytest.fixture
def start_front():
    """Starts fronts that are closed after the test."""
    fronts = []

    def start(service=None, **kwargs):
        front = FrontThread(service or FakeService(), **kwargs)
        fronts.append(front)
        return front

    yield start
    for front in fronts:
        front.close()


@pytest.fixture(scope="module")
def front():
    """A front that answers at once, shared by a module's tests."""
    front = FrontThread(FakeService())
    yield front
    front.close()
