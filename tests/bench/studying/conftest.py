"""A small classifier with its samples, for what is compared with dense matrices."""

import pytest
from dense import classifier, images


@pytest.fixture
def model():
    return classifier().eval()


@pytest.fixture
def samples():
    return images(24)
