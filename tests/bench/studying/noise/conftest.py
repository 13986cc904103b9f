"""Twelve samples, a number that the tests of the scales know."""

import pytest
from dense import images


@pytest.fixture
def samples():
    return images(12)
