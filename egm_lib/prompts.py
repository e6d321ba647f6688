"""Every prompt and answer template: what a model family is asked, and how it writes its answer.

The prompts are the families' interface (paper, Fig. 7 and Table 8) and must stay as they are, to
the letter.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from egm_lib.boxes import BoxFrame, convert

Task = Literal["vanilla", "amodal"]
FamilyName = Literal["qwen3-vl", "internvl-3"]
TASKS: tuple[Task, ...] = get_args(Task)
# authors-sft: the prompt of the paper and of the authors' SFT data. authors-eval: that of their RL
# data and evaluation, which for Qwen3-VL lacks the final full stop. qwen-refcoco: the one that
# Qwen's team gives for RefCOCO (QwenLM/Qwen3-VL, issue 1721).
PromptName = Literal["authors-sft", "authors-eval", "qwen-refcoco"]
PROMPT_NAMES: tuple[PromptName, ...] = get_args(PromptName)
DEFAULT_PROMPT: PromptName = "authors-sft"


def _tag(*names: str) -> re.Pattern[str]:
    """Opening or closing tags of these names, in any letter case and with blanks inside."""
    return re.compile(
        rf"<\s*+(?P<close>/?+)\s*+(?:{'|'.join(names)})\s*+>", re.ASCII | re.IGNORECASE
    )


# Models write these tags in several ways: <think>, <Think>, <thinking>, </think >, with a prefix
# (<seed:think>, <longcat_think>) or attributes, with a slash as JSON writes it (<\/think>), and in
# the ways of Kimi-VL, Magistral, Virgo and Cohere: ◁think▷, [THINK], <|begin_of_thought|>,
# <|START_THINKING|>.
REASONING_TAG = re.compile(
    r"""
    [<◁\[] (?: (?<!\[)\s*+ | (?=/?(?-i:THINK)\]) )  # one set of characters first is fast
    \|?+ (?P<close> \\?/ | end_(?:of_)?+ )?+ \s*+
    (?: (?:begin|start)_(?:of_)?+ | [a-z0-9]{1,20}+[:_] )?
    (?: think | thinking | thoughts? | reasoning | analysis | scratchpad ) (?:_process)?+
    (?: \s++\w++=[^<>]{0,99}+ )?+
    \s*+ (?: \|?>|[▷\]] )
    """,
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
ANSWER_TAG = _tag("answer")
# The tags of the families' own answers, as they write them
PROTOCOL_TAGS = tuple(
    f"<{slash}{name}>" for name in ("think", "answer", "ref", "box") for slash in ("", "/")
)
_PART_TAG = _tag("answer", "ref", "box")


def quoted_tag(text: str) -> str | None:
    """A tag in a label or a reasoning that would make its answer unreadable; None without one."""
    tag = REASONING_TAG.search(text) or _PART_TAG.search(text)
    return tag and tag[0]


@dataclass(frozen=True)
class Family:
    """How one family of models is asked for a box, and how it answers."""

    name: FamilyName
    frame: BoxFrame
    prompts: Mapping[str, Mapping[str, str]]  # by name of the prompt and by task
    # What the chat template has already written when the model starts; "" for nothing
    reasoning_opener: str
    no_reasoning_prefix: str  # assistant text that switches the reasoning off
    write_answer: Callable[[list[int], str | None, str | None], str]

    def prompt(self, expression: str, task: str, name: str = DEFAULT_PROMPT) -> str:
        """The user's text for a referring expression.

        task: "vanilla" or "amodal". name: one of PROMPT_NAMES.
        Raises ValueError for an unknown task, a prompt that this family does not have, and a blank
        expression.
        """
        if name not in self.prompts:
            raise ValueError(
                f"{self.name} has no prompt {name!r}: use one of {', '.join(self.prompts)}"
            )
        by_task = self.prompts[name]
        if task not in by_task:
            known = f"use one of {', '.join(by_task)}"
            raise ValueError(f"unknown task {task!r} for the prompt {name!r}: {known}")
        if not expression.strip():
            raise ValueError("the referring expression is empty")
        return by_task[task].replace("{expression}", expression)

    def messages(self, prompt: str) -> list[dict]:
        """The prompt as a chat with one image, as `apply_chat_template` takes it."""
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]

    def answer(
        self,
        box_px: Sequence[float],
        image_wh: tuple[int, int],
        label: str | None,
        reasoning: str | None,
        *,
        grid: int = 1,
    ) -> str:
        """The assistant's text for a box, as this family writes it.

        The box is written as integers of 0-1000, neither clipped nor checked.
        reasoning None: the answer alone, starting with `no_reasoning_prefix`.
        label None: the answer names no object.
        grid: coordinates are rounded to its multiples, because the miniature's vocabulary only has
        the multiples of 20.
        Raises ValueError if label or reasoning quotes a tag that would make the answer unreadable,
        and if the reasoning is blank.
        """
        for text in (label or "", reasoning or ""):
            if tag := quoted_tag(text):
                raise ValueError(f"{tag} inside an answer would make it unreadable: {text!r}")
        if reasoning is not None and not reasoning.strip():
            raise ValueError("the reasoning is blank: pass None for an answer without reasoning")
        box = convert(box_px, BoxFrame.PIXEL, self.frame, image_wh)
        return self.write_answer(
            [round(value / grid) * grid for value in box], label, reasoning and reasoning.strip()
        )


def _qwen_answer(box: list[int], label: str | None, reasoning: str | None) -> str:
    item = json.dumps(
        {"bbox_2d": box} | ({} if label is None else {"label": label}), ensure_ascii=False
    )
    thought = "" if reasoning is None else reasoning + "\n"
    return f"{thought}</think>\n\n```json\n[\n\t{item}\n]\n```"


def _internvl_answer(box: list[int], label: str | None, reasoning: str | None) -> str:
    thought = "" if reasoning is None else f"<think>{reasoning}</think>"
    named = "" if label is None else f"<ref>{label}</ref>"
    return f"{thought}<answer>{named}<box>{box}</box></answer>"


def _by_task(text: str, amodal: str = "") -> dict[str, str]:
    """A prompt with {amodal} for both tasks; without it, for vanilla alone."""
    vanilla = text.replace("{amodal}", "")
    return {"vanilla": vanilla} | ({"amodal": text.replace("{amodal}", amodal)} if amodal else {})


_QWEN = "Locate {expression}{amodal}, output its bbox coordinates using JSON format"
_INTERNVL = _by_task(
    "Please provide the {amodal}bounding box coordinate of the region this sentence describes: "
    "<ref>{expression}</ref>",
    amodal="amodal ",
)

FAMILIES: dict[str, Family] = {
    "qwen3-vl": Family(
        name="qwen3-vl",
        frame=BoxFrame.NORM_1000,
        prompts={
            "authors-sft": _by_task(_QWEN + ".", amodal=" amodally"),
            "authors-eval": _by_task(_QWEN, amodal=" amodally"),
            "qwen-refcoco": _by_task(
                'Locate every object that matches the description "{expression}" in the image. '
                "Report bbox coordinates in JSON format."
            ),
        },
        reasoning_opener="<think>\n",
        no_reasoning_prefix="</think>\n\n",
        write_answer=_qwen_answer,
    ),
    "internvl-3": Family(
        name="internvl-3",
        frame=BoxFrame.NORM_1000,
        prompts={"authors-sft": _INTERNVL, "authors-eval": _INTERNVL},
        reasoning_opener="",
        no_reasoning_prefix="<answer>",
        write_answer=_internvl_answer,
    ),
}
