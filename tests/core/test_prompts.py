"""Prompts are the paper's to the letter, and the parser recovers what an answer was made of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egm_lib.parsing import parse_completion
from egm_lib.prompts import FAMILIES, PROMPT_NAMES, PROTOCOL_TAGS, TASKS

# Any text, boxes and quotes included, that does not quote a protocol tag
texts = (
    (
        st.text()
        | st.sampled_from(
            ["[1, 2, 3, 4]", '"bbox_2d": [9, 9, 99, 99]', 'a "quoted" cat', "(1,2),(3,4)"]
        )
    )
    .map(str.strip)
    .filter(lambda text: text and not any(tag in text for tag in PROTOCOL_TAGS))
)
grid = st.integers(-50, 1050)
ends = st.tuples(grid, grid).map(sorted)
boxes = st.tuples(ends, ends).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))


@pytest.mark.parametrize(
    "family, task, expected",
    [  # Fig. 7 and Table 8
        ("qwen3-vl", "vanilla", "Locate red cup, output its bbox coordinates using JSON format."),
        (
            "qwen3-vl",
            "amodal",
            "Locate red cup amodally, output its bbox coordinates using JSON format.",
        ),
        (
            "internvl-3",
            "vanilla",
            "Please provide the bounding box coordinate of the region this sentence describes: "
            "<ref>red cup</ref>",
        ),
        (
            "internvl-3",
            "amodal",
            "Please provide the amodal bounding box coordinate of the region this sentence "
            "describes: "
            "<ref>red cup</ref>",
        ),
    ],
)
def test_prompts_are_the_papers(family, task, expected):
    assert FAMILIES[family].prompt("red cup", task) == expected


@pytest.mark.parametrize(
    "family, name, task, expected",
    [
        # The authors' RL data and evaluation lack the full stop of their SFT data
        (
            "qwen3-vl",
            "authors-eval",
            "vanilla",
            "Locate red cup, output its bbox coordinates using JSON format",
        ),
        (
            "qwen3-vl",
            "authors-eval",
            "amodal",
            "Locate red cup amodally, output its bbox coordinates using JSON format",
        ),
        # QwenLM/Qwen3-VL, issue 1721
        (
            "qwen3-vl",
            "qwen-refcoco",
            "vanilla",
            'Locate every object that matches the description "red cup" in the image. '
            "Report bbox coordinates in JSON format.",
        ),
    ],
)
def test_named_prompts(family, name, task, expected):
    assert FAMILIES[family].prompt("red cup", task, name=name) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_without_a_name_is_that_of_the_sft_data(family, task):
    prompt = FAMILIES[family].prompt
    assert prompt("red cup", task) == prompt("red cup", task, name="authors-sft")


def test_a_prompt_that_a_family_lacks_is_named():
    with pytest.raises(
        ValueError, match="internvl-3 has no prompt 'qwen-refcoco': use one of auth"
    ):
        FAMILIES["internvl-3"].prompt("cup", "vanilla", name="qwen-refcoco")
    with pytest.raises(ValueError, match="unknown task 'amodal' for the prompt 'qwen-refcoco'"):
        FAMILIES["qwen3-vl"].prompt("cup", "amodal", name="qwen-refcoco")


def test_every_family_prompt_has_a_known_name():
    assert {name for family in FAMILIES.values() for name in family.prompts} == set(PROMPT_NAMES)


def test_answers_are_written_as_the_families_write_them():
    # the shape of the training targets of the released code, rows 0 and 1 of the parser bank
    assert FAMILIES["qwen3-vl"].answer(
        (444, 468, 757, 745), (1000, 1000), "lady in blue", "Look."
    ) == (
        'Look.\n</think>\n\n```json\n[\n\t{"bbox_2d": [444, 468, 757, 745], "label": "lady in '
        'blue"}\n]\n```'
    )
    assert FAMILIES["internvl-3"].answer((81, 104, 998, 999), (1000, 1000), "man", "Look.") == (
        "<think>Look.</think><answer><ref>man</ref><box>[81, 104, 998, 999]</box></answer>"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_reasoning_continues_the_prefix_that_switches_it_off(name):
    family = FAMILIES[name]
    answer = family.answer((1, 2, 3, 4), (1000, 1000), "cup", None)
    assert answer.startswith(family.no_reasoning_prefix)
    assert parse_completion(answer, frame=family.frame, image_wh=(1000, 1000)).reasoning is None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None)
@given(box=boxes, label=st.none() | texts, reasoning=st.none() | texts)
def test_parse_of_render_is_the_identity(name, task, box, label, reasoning):
    family = FAMILIES[name]
    assert label is None or label in family.prompt(label, task)
    answer = family.answer(box, (1000, 1000), label, reasoning)
    # Without and with what the chat template wrote
    for completion in (answer, family.reasoning_opener + answer):
        parsed = parse_completion(completion, frame=family.frame, image_wh=(1000, 1000))
        assert (parsed.reasoning, parsed.boxes, parsed.box, parsed.status) == (
            reasoning,
            [box],
            box,
            "ok",
        )


def test_the_box_is_written_in_the_familys_frame():
    answer = FAMILIES["qwen3-vl"].answer((64, 48, 320, 480), (640, 480), "cup", None)
    assert "[100, 100, 500, 1000]" in answer


def test_the_grid_coarsens_the_coordinates():
    answer = FAMILIES["qwen3-vl"].answer((114, 126, 509, 990), (1000, 1000), None, None, grid=20)
    assert "[120, 120, 500, 1000]" in answer


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_answer_that_could_not_be_parsed_is_refused(family):
    with pytest.raises(ValueError, match="unknown task 'modal'"):
        family.prompt("cup", "modal")
    with pytest.raises(ValueError, match="empty"):
        family.prompt("  ", "vanilla")
    with pytest.raises(ValueError, match="</think>"):
        family.answer((1, 2, 3, 4), (10, 10), "cup", "so </think> it is")
    with pytest.raises(
        ValueError, match="</Thinking >"
    ):  # the parser would end the reasoning there
        family.answer((1, 2, 3, 4), (10, 10), "cup", "so </Thinking > it is")
    with pytest.raises(ValueError, match="<answer>"):
        family.answer((1, 2, 3, 4), (10, 10), "<answer>", None)
    with pytest.raises(ValueError, match="blank"):
        family.answer((1, 2, 3, 4), (10, 10), "cup", " ")


def test_messages_carry_the_image_before_the_text():
    (message,) = FAMILIES["qwen3-vl"].messages("Locate cup")
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"] == "Locate cup"
