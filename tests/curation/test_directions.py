"""How far an amodal box extends, in words."""

import pytest

from egm_lib.curation.directions import extensions


@pytest.mark.parametrize(
    "amodal, expected",
    [
        ((100, 100, 200, 200), []),  # nothing hidden
        ((100, 100, 200, 204), []),  # 4 % is drawing noise
        ((100, 100, 200, 205), [("downward", "slightly")]),
        ((80, 100, 200, 200), [("to the left", "a bit")]),
        ((100, 60, 200, 200), [("upward", "moderately")]),
        ((100, 100, 280, 200), [("to the right", "considerably")]),
        ((100, 100, 350, 200), [("to the right", "significantly")]),
        ((90, 100, 200, 300), [("downward", "significantly"), ("to the left", "slightly")]),
    ],
)
def test_directions_and_degrees(amodal, expected):
    """Visible part 100 x 100 px: shares of its side read off directly."""
    assert extensions((100, 100, 200, 200), amodal) == expected
