import pytest


def f(a, b):
    if a == pytest.approx(b):
        raise AssertionError
    assert not a == pytest.approx(b)  # noqa: SIM201
    assert a != pytest.approx(b)
