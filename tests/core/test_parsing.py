"""The parser on real answers, hostile answers, and answers made of anything."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egm_lib.boxes import BoxFrame, iou
from egm_lib.files import read_jsonl
from egm_lib.parsing import MAX_GROUPS, RULES, Parsed, accepts, parse_completion

BANK = Path(__file__).parents[3] / "shared" / "data" / "parser_bank.jsonl"
FRAMES = {
    "rel1000": BoxFrame.NORM_1000,
    "rel999": BoxFrame.NORM_1000,
    "rel1": BoxFrame.NORM_1,
    "abs_px_resized": BoxFrame.PIXEL,
    "none": BoxFrame.NORM_1000,
}
# Rows of the bank whose expectation is a matter of judgement; docs/scoring-rules.md gives the
# reasons.
ARGUED = {
    # Prose that weighs three boxes and ends with its choice: the first box counts
    4: (838, 129, 993, 999),
    62: (44, 91, 901, 92),  # swapped corners are sorted
}


def parse(
    text: str,
    frame: BoxFrame = BoxFrame.PIXEL,
    wh: tuple[int, int] = (1000, 1000),
    rule: str = "egm",
) -> Parsed:
    return parse_completion(text, frame=frame, image_wh=wh, rule=rule)


@pytest.mark.skipif(not BANK.exists(), reason="the parser bank is not part of the project")
def test_the_parser_bank_comes_out_as_expected():
    rows = read_jsonl(BANK)
    assert len(rows) == 93
    for row in rows:
        expected = ARGUED.get(row["id"], row["expected"] and tuple(row["expected"]))
        wh = (1, 1) if row["convention"] == "rel1" else (1000, 1000)
        parsed = parse(row["raw"], FRAMES[row["convention"]], wh)
        assert parsed.box == expected, (row["id"], row["note"])
        assert (parsed.status == "ok") == (expected is not None), row["id"]


@pytest.mark.parametrize(
    "answer, box",
    [
        ('{"bbox_2d": [1, 2, 3, 4]}', (1, 2, 3, 4)),  # bare object, no fence
        # A box inside the reasoning does not count
        ("left of [5, 6, 7, 8]\n</think>\n[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<think>[5, 6, 7, 8]</think><answer>[1, 2, 3, 4]</answer>", (1, 2, 3, 4)),
        # Other ways to write the tags
        ("<thinking>[5, 6, 7, 8]</thinking>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<Think>[5, 6, 7, 8]</Think>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<think>[5, 6, 7, 8]</think >[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("[5, 6, 7, 8]< / THINK >[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<think>[5, 6, 7, 8]</thinking>[1, 2, 3, 4]", (1, 2, 3, 4)),  # closed by another name
        ("<thought>[5, 6, 7, 8]</thought>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<reasoning>[5, 6, 7, 8]</reasoning><Answer>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<analysis>[5, 6, 7, 8]</analysis>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<scratchpad>[5, 6, 7, 8]</scratchpad>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<seed:think>[5, 6, 7, 8]</seed:think>[1, 2, 3, 4]", (1, 2, 3, 4)),  # Seed
        ("\u25c1think\u25b7[5, 6, 7, 8]\u25c1/think\u25b7[1, 2, 3, 4]", (1, 2, 3, 4)),  # Kimi-VL
        ("[THINK][5, 6, 7, 8][/THINK][1, 2, 3, 4]", (1, 2, 3, 4)),  # Magistral
        (
            "<|begin_of_thought|>[5, 6, 7, 8]<|end_of_thought|>[1, 2, 3, 4]",  # Virgo
            (1, 2, 3, 4),
        ),
        (
            "<|START_THINKING|>[5, 6, 7, 8]<|END_THINKING|>[1, 2, 3, 4]",  # Cohere
            (1, 2, 3, 4),
        ),
        ("<longcat_think>[5, 6, 7, 8]</longcat_think>[1, 2, 3, 4]", (1, 2, 3, 4)),  # LongCat
        ("<|think|>[5, 6, 7, 8]<|/think|>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<thinking_process>[5, 6, 7, 8]</thinking_process>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("[1, 2, 3, 4] <end_think_tank> <|process|>", (1, 2, 3, 4)),  # no tags of reasoning
        ('<think step="1">[5, 6, 7, 8]</think>[1, 2, 3, 4]', (1, 2, 3, 4)),
        ("<think>[5, 6, 7, 8]<\\/think>[1, 2, 3, 4]", (1, 2, 3, 4)),  # as JSON writes a slash
        ("[Think] of a box: [1, 2, 3, 4]", (1, 2, 3, 4)),  # a word in brackets is no tag
        ("[1, 2, 3, 4] <think about it> [/analysis]", (1, 2, 3, 4)),
        ("[5, 6, 7, 8] <Answer>[1, 2, 3, 4]</ANSWER> [5, 6, 7, 8]", (1, 2, 3, 4)),
        ("[5, 6, 7, 8] <answer >[1, 2, 3, 4]</answer >", (1, 2, 3, 4)),
        ("<thinker>[1, 2, 3, 4]</rethink>", (1, 2, 3, 4)),  # no tags of reasoning
        # Reasoning that quotes its own end
        ("a</think>[5, 6, 7, 8]</think>[1, 2, 3, 4]", (1, 2, 3, 4)),
        # A candidate before the answer
        ("[5, 6, 7, 8] <answer>[1, 2, 3, 4]</answer>", (1, 2, 3, 4)),
        # The last <answer>
        ("<answer>[5, 6, 7, 8]</answer> no, <answer>[1, 2, 3, 4]</answer>", (1, 2, 3, 4)),
        ("<answer>[1, 2, 3, 4]</answer> [5, 6, 7, 8]", (1, 2, 3, 4)),  # nothing counts after it
        ("<answer>[1, 2, 3, 4]", (1, 2, 3, 4)),  # cut off before it could close
        ("[1, 2, 3]", None),  # three numbers are no box
        ("[1, 2, 3, 4, 5]", None),  # nor are five
        ("[1, 2, , 4]", None),
        ("[1, 2, 3, 4", None),  # cut off: the last number may have had more digits
        ("[1,2,3,4]", (1, 2, 3, 4)),
        ("[ 1 ,\n2\t,3, 4\n]", (1, 2, 3, 4)),
        ("[1 2 3 4]", (1, 2, 3, 4)),  # as numpy prints it
        ("[1, 2, 3, 4,]", (1, 2, 3, 4)),  # a trailing comma
        ("[[1, 2, 3, 4]]", (1, 2, 3, 4)),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", (1, 2, 3, 4)),  # several: the first
        ("[[1, 2], [3, 4]]", None),  # two points are no box ...
        ("(1, 2), (3, 4)", (1, 2, 3, 4)),  # ... but this is how Qwen-VL writes one
        ("(1,2),(3,4)", (1, 2, 3, 4)),
        ("(1,2)(3,4)", (1, 2, 3, 4)),
        ("[(1, 2), (3, 4)]", (1, 2, 3, 4)),
        ("(1, 2, 3, 4)", (1, 2, 3, 4)),
        ("(1, 2), (3, 4), (5, 6)", None),  # a polygon
        ("(1, 2)", None),  # a point
        ("<box>1, 2, 3, 4</box>", (1, 2, 3, 4)),  # no brackets
        ("<ref>a [9, 9, 9, 9]</ref><box>[1, 2, 3, 4]</box>", (1, 2, 3, 4)),  # a box inside a label
        ('{"label": "a [9, 9, 9, 9]", "bbox_2d": [1, 2, 3, 4]}', (1, 2, 3, 4)),
        ("{'label': 'a [9, 9, 9, 9]', 'bbox_2d': [1, 2, 3, 4]}", (1, 2, 3, 4)),
        (r'{"label": "say \"[9, 9, 9, 9]\"", "bbox_2d": [1, 2, 3, 4]}', (1, 2, 3, 4)),
        ('{"bbox_2d": "[1, 2, 3, 4]"}', (1, 2, 3, 4)),  # a box as a string
        ("<box><1><2><3><4></box>", (1, 2, 3, 4)),
        ("<1><2><3><4><5>", None),
        ('{"x_min": 1, "y_min": 2, "x_max": 3, "y_max": 4}', (1, 2, 3, 4)),
        ('{"x2": 3, "y2": 4, "x1": 1, "y1": 2}', (1, 2, 3, 4)),  # any order
        ("xmin=1, ymin=2, xmax=3, ymax=4", (1, 2, 3, 4)),
        ('{"x1": 1, "y1": 2, "x2": 3}', None),
        ('{"x1": 9, "x1": 1, "y1": 2, "x2": 3, "y2": 4}', (1, 2, 3, 4)),  # begun anew
        ("[x1, y1, x2, y2]", None),  # the template itself
        ("x1=1 px, y1=2 px, x2=3 px and y2=4 px", (1, 2, 3, 4)),  # side by side
        ('{"a": {"x1": 1, "y1": 2}, "b": {"x2": 3, "y2": 4}}', (1, 2, 3, 4)),
        # Corners here and there in a sentence
        ("From x1=1 the dog, y1=2 high, reaches x2=3, so y2=4 is its foot.", None),
        ("Its x1=9 is left of the cat. x1=1, y1=2, x2=3, y2=4", (1, 2, 3, 4)),
        ('{"label": "x1=1, y1=2, x2=3, y2=4"}', None),  # corners inside a label
        ("<ref>x1=1, y1=2, x2=3, y2=4</ref>", None),
        ("[-1, -2.5, 3, 4]", (-1, -2.5, 3, 4)),
        ("[1e1, 2E+1, .5e2, 600e-1]", (10, 20, 50, 60)),
        ("[+1, 2., 3.0, 4]", (1, 2, 3, 4)),
        ("［１，２，３，４］", (1, 2, 3, 4)),  # full-width digits and punctuation
        ("[1、2、3、4]", (1, 2, 3, 4)),  # ideographic commas
        ("[\u22121, 2, 3, 4]", (-1, 2, 3, 4)),  # a typographer's minus
        ("[1_0, 2, 3, 4]", None),  # what Python's float() would take, and no model means
        ("[nan, 2, 3, 4]", None),
        ("[1e999, 2, 3, 4]", None),  # overflows
        ("[1e308, 2, 3, 4]", (3, 2, 1e308, 4)),  # absurd, but a number
        ("[1-2, 2, 3, 4]", None),
        ("[245,[234,543,542,244]]", None),  # a list among numbers: which is meant?
        ("[3, 4, 1, 2]", (1, 2, 3, 4)),  # swapped corners
        ("", None),
    ],
)
def test_answers(answer, box):
    assert parse(answer).box == box


@pytest.mark.parametrize(
    "answer, status",
    [
        ("[1, 2, 3, 4]", "ok"),
        ("There is no such thing.", "no_box"),
        ("```json\n[]\n```", "no_box"),
        ("<think>a</think>", "no_box"),  # the reasoning is closed, the answer is empty
        ("<think>at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<thinking>at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<Think>at x1=1, y1=2, x2=3, y2=4", "unclosed_reasoning"),
        ("< think >at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<think step='1'>at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("\u25c1think\u25b7at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("[THINK]at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<|START_THINKING|>at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<longcat_think>at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<seed:think>at [1, 2, 3, 4]", "unclosed_reasoning"),
        ("<think>at [1, 2, 3, 4] <answer>[5, 6, 7, 8]</answer>", "unclosed_reasoning"),
        ("a</think>[1, 2, 3, 4]<think>or", "unclosed_reasoning"),  # thinking again: no final answer
        ("[1, 2, 3]", "malformed"),
        ("(995987)", "malformed"),
        ('{"bbox_2d": [1, 2, 3, 4', "malformed"),  # cut off
        ('{"bbox_2d": null}', "malformed"),
        ("<box></box>", "malformed"),
    ],
)
def test_status(answer, status):
    parsed = parse(answer)
    assert parsed.status == status
    assert (parsed.box is None) == (status != "ok") == (parsed.boxes == [])


@pytest.mark.parametrize(
    "text, reasoning",
    [
        ("<think>\nwhy\n</think>\n[1, 2, 3, 4]", "why"),
        ("why\n</think>\n[1, 2, 3, 4]", "why"),  # the chat template wrote the opening tag
        ("</think>\n\n[1, 2, 3, 4]", None),  # switched off
        ("<think> </think>[1, 2, 3, 4]", None),
        ("[1, 2, 3, 4]", None),
        ("<think>why", "why"),
        ("<Thinking>why</thinking >[1, 2, 3, 4]", "why"),
    ],
)
def test_reasoning(text, reasoning):
    assert parse(text).reasoning == reasoning


def test_every_box_of_the_answer_is_kept_and_sorted_ones_are_counted():
    parsed = parse("no [9, 9, 10, 10]</think>[[1, 2, 3, 4], [7, 8, 5, 6], [1, 2]]")
    assert parsed.boxes == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert parsed.swapped == 1


def test_a_very_long_list_of_boxes_is_cut():
    for box in ("[1, 2, 3, 4]", "(1, 2, 3, 4)", "<1><2><3><4>;", "x1=1, y1=2, x2=3, y2=4;"):
        assert parse(box * 200).boxes == [(1, 2, 3, 4)] * 200
        assert len(parse(box * 5000).boxes) == MAX_GROUPS


@pytest.mark.parametrize(
    "frame, scale", [(BoxFrame.PIXEL, 1), (BoxFrame.NORM_1000, 0.64), (BoxFrame.NORM_1, 640)]
)
def test_the_frame_is_declared_never_guessed(frame, scale):
    box = parse("[0.1, 0.2, 0.3, 0.4]", frame, (640, 640)).box
    assert box == pytest.approx([value * scale for value in (0.1, 0.2, 0.3, 0.4)])


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'coco'.*egm-released-eval"):
        parse("[1, 2, 3, 4]", rule="coco")
    with pytest.raises(ValueError, match="image_wh"):
        parse("[1, 2, 3, 4]", wh=(0, 5))
    with pytest.raises(ValueError, match="unknown box frame"):
        parse("[1, 2, 3, 4]", frame="rel1000")
    with pytest.raises(ValueError, match="unknown rule"):
        accepts(0.6, "coco")


tags = [
    "<think>",
    "</think>",
    "< Thinking",
    "</THINK >",
    "<answer>",
    "</answer>",
    "</Answer>",
    "<box>",
    "</box>",
    "<ref>",
    "</ref>",
    '{"bbox_2d": [',
    "bbox",
]
signs = [
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    "),(",
    ",",
    " ",
    "\n",
    '"',
    "'",
    "\\",
    ": ",
    "=",
    "x_min",
    '"x1": 1',
    "<1><2>",
]
numbers = [
    "1",
    "-2.5",
    "1e308",
    "-1e308",
    "9" * 400,
    "１",
    "［",
    "[1, 2, 3, 4]",
    "(1,2),(3,4)",
    "<1><2><3><4>",
]
fragments = st.sampled_from(tags + signs + numbers + ["\ud800", "İ", "ſ", "\x00"])
answers = (
    st.text()
    | st.lists(fragments, max_size=30).map("".join)
    | st.lists(fragments | st.text()).map("".join)
)
sizes = st.sampled_from([(1, 1), (640, 480), (10**9, 1)])


@settings(deadline=None)
@given(answers, st.sampled_from(list(BoxFrame)), st.sampled_from(RULES), sizes)
def test_any_text_gives_a_consistent_result(text, frame, rule, wh):
    parsed = parse(text, frame, wh, rule)
    assert parsed.status in ("ok", "no_box", "unclosed_reasoning", "malformed")
    assert (parsed.status == "ok") == (parsed.box is not None) == bool(parsed.boxes)
    if parsed.box is not None:
        assert parsed.box in parsed.boxes
        assert all(abs(value) < float("inf") for box in parsed.boxes for value in box)
        if rule == "egm":
            assert all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in parsed.boxes)
    assert parsed.reasoning is None or parsed.reasoning == parsed.reasoning.strip() != ""


@settings(deadline=None)
@given(answers)
def test_a_box_inside_the_reasoning_never_counts(text):
    for opening, closing in (("<think>", "</think>"), ("< Thinking >", "</THINKING >")):
        assert parse(f"{text}{opening}{text.replace('/', '')}").box is None
        assert parse(f"{text}{closing}").box is None


FENCED = '```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "cat"}\n]\n```'


@pytest.mark.parametrize(
    "rule, text, box",
    [  # image 1000 x 500, declared frame 0-1000
        ("egm", FENCED, (100, 100, 300, 200)),
        ("egm-released-eval", FENCED, (100, 100, 300, 200)),
        # The keyed box, wherever it stands
        ("egm-released-eval", f"[1, 2, 3, 4] {FENCED}", (100, 100, 300, 200)),
        # Even in reasoning
        ("egm-released-eval", f'"bbox_2d": [10, 20, 30, 40] </think> {FENCED}', (10, 10, 30, 20)),
        # Last four numbers of any text
        ("egm-released-eval", "from 10 to 5 20 30 40", (5, 10, 30, 20)),
        # Clipped, and made a pixel wide
        ("egm-released-eval", "[10, 20, 10, 2000]", (10, 10, 11, 499)),
        # The last one
        ("egm-released-reward", "[10, 20, 30, 40] or [50, 60, 70, 80]", (50, 30, 70, 40)),
        # Sorted
        (
            "egm-released-reward",
            "<answer>[30, 40, 10, 20]</answer> [50, 60, 70, 80]",
            (10, 10, 30, 20),
        ),
        ("egm-released-reward", "[50, 60, 70, 80, 90]", (50, 30, 70, 40)),  # the first four of five
        ("egm-released-reward", "[10, 20, 30, 40] see [1]", None),  # a footnote hides the answer
        ("internvl", "<box>[[100, 200, 300, 400]]</box>", (100, 100, 300, 200)),
        ("internvl", "[0.1, 0.2, 0.3, 0.4]", (100, 100, 300, 200)),  # a small sum is taken for 0-1
        ("internvl", "cats [a, b, c, d] [1, 2, 3, 4]", None),  # the first bracket decides
        ("internvl", "[1, 2,\n3, 4]", None),  # has to stand on one line
        ("qwen-vl", "(99.9,199.8),(299.7,399.6)", (100, 100, 300, 200)),
        ("qwen-vl", "(100, 200), (300, 400)", None),  # not a space between
        ("qwen-vl", FENCED, None),
        ("lmms-eval", "[0.1, 0.2, 0.3, 0.4]", (100, 100, 300, 200)),
        # 0-1000 taken as is: scores zero
        ("lmms-eval", FENCED, (100_000, 100_000, 300_000, 200_000)),
        ("vlmevalkit", FENCED, (100, 100, 300, 200)),
        ("vlmevalkit", "[0.1, 0.2, 0.3, 0.4]", (100, 100, 300, 200)),  # guessed to be 0-1
        # Guessed to be pixels, and clipped
        ("vlmevalkit", "[100, 200, 300, 1001]", (100, 200, 300, 500)),
        ("vlmevalkit", "300 400 100 200 5", (100, 100, 300, 200)),  # first four numbers, sorted
        ("vlm-r1", FENCED, None),  # no <answer>
        # The last
        (
            "vlm-r1",
            "<answer>{'a': [1, 2, 3, 4], 'b': [100, 200, 300, 400]}</answer>",
            (100, 100, 300, 200),
        ),
        ("vlm-r1", "<answer>{'a': [100.0, 200, 300, 400]}</answer>", None),  # integers only
    ],
)
def test_peer_rules(rule, text, box):
    parsed = parse(text, BoxFrame.NORM_1000, (1000, 500), rule)
    assert parsed.box == (box and pytest.approx(box))


@pytest.mark.parametrize("rule", RULES)
def test_acceptance_at_exactly_half(rule):
    assert accepts(0.5 + 1e-9, rule) and not accepts(0.5 - 1e-9, rule)
    assert accepts(0.5, rule) == (rule not in ("egm", "egm-released-eval", "vlm-r1"))


def test_the_table_in_the_docs_is_what_the_rules_do():
    text = (Path(__file__).parents[2] / "docs" / "scoring-rules.md").read_text(encoding="utf-8")
    header, _, *lines = (
        text.split("<!-- table: rules on the same answers -->\n")[1].split("\n\n")[0].splitlines()
    )
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["answer", *RULES]
    for line in lines:
        answer, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for rule, cell in zip(RULES, cells, strict=True):
            box = parse(answer.strip("`"), BoxFrame.NORM_1000, (640, 480), rule).box
            expected = (
                "."
                if box is None
                else "+"
                if accepts(iou(box, (320, 120, 480, 480)), rule)
                else "x"
            )
            assert cell == expected, (answer, rule)
