"""Every prompt and answer template, once: what a model family is asked, and how it writes its
answer.

The grounding prompts are the families' interface (paper, Fig. 7 and Table 8) and must stay as they
are, to the letter.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from egm_lib.boxes import BoxFrame, convert

Task = Literal["vanilla", "amodal"]
FamilyName = Literal["qwen3-vl", "internvl-3"]
TASKS: tuple[Task, ...] = get_args(Task)
# An answer that quoted one of these could not be taken apart again.
PROTOCOL_TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)


@dataclass(frozen=True)
class Family:
    """How one family of models is asked for a box, and how it answers."""

    name: FamilyName
    frame: BoxFrame
    prompts: dict[str, str]  # by task
    # What the chat template has already written when the model starts; "" where nothing
    reasoning_opener: str
    no_reasoning_prefix: str  # assistant text that switches the reasoning off
    write_answer: Callable[[list[int], str | None, str | None], str]

    def prompt(self, expression: str, task: str) -> str:
        """The user's text for a referring expression. task: "vanilla" or "amodal"."""
        if task not in self.prompts:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(self.prompts)}")
        if not expression.strip():
            raise ValueError("the referring expression is empty")
        return self.prompts[task].replace("{expression}", expression)

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
        """The assistant's text for a box, as this family writes it: 0-1000 integers, neither
        clipped nor checked.

        reasoning None: the answer alone, starting with `no_reasoning_prefix`. label None: the
        answer names no object.
        grid: coordinates are rounded to its multiples (the miniature's vocabulary has the multiples
        of 20 only).
        Raises ValueError where label or reasoning quotes a protocol tag, or the reasoning is blank.
        """
        for text in (label or "", reasoning or ""):
            if tag := next((tag for tag in PROTOCOL_TAGS if tag in text), None):
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


FAMILIES: dict[str, Family] = {
    "qwen3-vl": Family(
        name="qwen3-vl",
        frame=BoxFrame.NORM_1000,
        prompts={
            "vanilla": "Locate {expression}, output its bbox coordinates using JSON format.",
            "amodal": "Locate {expression} amodally, output its bbox coordinates using JSON "
            "format.",
        },
        reasoning_opener="<think>\n",
        no_reasoning_prefix="</think>\n\n",
        write_answer=_qwen_answer,
    ),
    "internvl-3": Family(
        name="internvl-3",
        frame=BoxFrame.NORM_1000,
        prompts={
            "vanilla": "Please provide the bounding box coordinate of the region this sentence "
            "describes: <ref>{expression}</ref>",
            "amodal": "Please provide the amodal bounding box coordinate of the region this "
            "sentence describes: <ref>{expression}</ref>",
        },
        reasoning_opener="",
        no_reasoning_prefix="<answer>",
        write_answer=_internvl_answer,
    ),
}
