"""Coverage-guided fuzzing of parser and reward: no text may raise, or break a property.

Opt-in, because atheris is not among the project's requirements:
    pip install atheris && python tests/core/fuzz_parsing.py -runs=1000000 -max_len=512 -timeout=5
What it finds belongs in test_parsing.py, as a case.
"""

import sys
from math import isfinite

import atheris

with atheris.instrument_imports(include=["egm_lib"]):
    from egm_lib.boxes import BoxFrame
    from egm_lib.parsing import RULES, parse_completion
    from egm_lib.reward import egm_reward

FRAMES = list(BoxFrame)
SIZES = [(640, 480), (1, 1), (10**9, 3)]
GT = (0.0, 0.0, 1.0, 1.0)
# One byte picks a fragment, so that the grammar is in reach of random bytes
TAGS = (
    "<think> </think> <answer> </answer> <box> </box> <ref> </ref> "
    'bbox {"bbox_2d": "label": ```json'
)
BOXES = (
    "[1,2,3,4] (1,2),(3,4) <1><2><3><4> x_min y_min x_max y_max x1 y1 x2 y2 "
    "),( ]] [[ [ ] ( ) { } < >"
)
NUMBERS = "0 1 9 . - + e E 1e308 -1e308 1e999 99999999999999999999 nan inf １ ［ ， 、 −"
SIGNS = [" ", "\n", "\t", '"', "'", "\\", ",", ":", "=", "\u3000", "\x00", "İ", "\ud800"]
FRAGMENTS = [*TAGS.split(), *BOXES.split(), *NUMBERS.split(), *SIGNS]


def text_of(data: bytes) -> str:
    if data[:1] > b"\x7f":
        return data[1:].decode("utf-8", errors="surrogateescape")
    return "".join(FRAGMENTS[byte % len(FRAGMENTS)] for byte in data[1:])


def test_one_input(data: bytes) -> None:
    text = text_of(data[2:])
    choice = int.from_bytes(data[:2], "big")
    frame, size = FRAMES[choice % 3], SIZES[choice // 3 % 3]
    rule = RULES[choice // 9 % len(RULES)] if choice & 1 else "egm"
    parsed = parse_completion(text, frame=frame, image_wh=size, rule=rule)
    assert (parsed.status == "ok") == (parsed.box is not None) == bool(parsed.boxes), parsed
    assert all(isfinite(value) for box in parsed.boxes for value in box), parsed
    if rule == "egm":
        assert all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in parsed.boxes), parsed
        (reward,) = egm_reward([text], [GT], [size], frame=frame)
        assert 0.0 <= reward <= 1.0, reward
    if "/" not in text:  # no tag is closed
        assert parse_completion("<think>" + text, frame=frame, image_wh=size).box is None


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
