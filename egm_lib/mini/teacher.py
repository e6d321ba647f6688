"""The miniature world's teacher: an HTTP transport that answers curation requests in process.

It stands where a proprietary VLM stands: the same client sends it the same requests. It does not
look at the image but knows the sample by the header `X-EGM-Sample` and reads what is true of it
in `teacher.jsonl`, one object a sample: sample_id, reasoning, amodal_reasoning | null,
amodal_expression | null, verify "YES" | "NO", planted_cause | null, gt_box and lookalike_boxes_px
(xyxy px). It errs at known rates, decided by a hash, and marks nothing in its answers;
`planted_error` tells afterwards, so that the filters' precision and recall can be measured.

It works every trace out, unless the request has a field `ways`: shares of the ways to reason, since
the traces of real teachers are not all alike. A hash of the sample decides which way it gets. In a
profile: `extra_body: {ways: {worked: 0.6, concluding: 0.3, restating: 0.1}}`, of the teacher.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from math import isclose
from pathlib import Path
from urllib.parse import unquote

import httpx2

from egm_lib.boxes import iou
from egm_lib.curation.ledger import OffsetIndex
from egm_lib.curation.tasks import CAUSES
from egm_lib.mini.language import WAYS, retell

# Share of a task's answers that are spoilt in each way.
ERROR_RATES = {
    "trace": {"mentions-drawn-box": 0.03, "refusal": 0.02, "truncated": 0.02},
    "amodal-expression": {"mentions-drawn-box": 0.03, "refusal": 0.02},
    "amodal-trace": {
        "mentions-drawn-box": 0.03,
        "wrong-direction": 0.03,
        "refusal": 0.02,
        "truncated": 0.02,
    },
}
# Share of failures for which a judge names another cause than the right one; independent between
# judges.
CONFUSION_RATES = {"mini-judge-1": 0.06, "mini-judge-2": 0.12, "mini-judge-3": 0.18}
CONFUSION_RATE = 0.12  # of any other judge
TINY_SHARE = 0.01  # of the image's area: below it a target counts as small
MENTIONS = (
    "it is inside the green box.",
    "see the green outline.",
    "the object marked with the green box.",
    "the bounding box shows it.",
    "this matches the box labelled ground truth.",
)
REFUSALS = (
    "I'm sorry, but I can't help with identifying that.",
    "I cannot assist with this request.",
    "I'm unable to determine which object is meant.",
)
OPPOSITES = {
    "upward": "downward",
    "downward": "upward",
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
}
_DIRECTION = re.compile(r"\b(upward|downward|left|right|up|down)\b")


class TeacherTransport(httpx2.AsyncBaseTransport):
    """Answers POST /chat/completions for the samples of one teacher.jsonl.

    error_rates: task -> kind -> share; confusion_rates: judge -> share; seed: another one spoils
    other samples.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        error_rates: Mapping[str, Mapping[str, float]] = ERROR_RATES,
        confusion_rates: Mapping[str, float] = CONFUSION_RATES,
        seed: int = 0,
    ) -> None:
        self.path = Path(path)
        self.error_rates, self.confusion_rates, self.seed = error_rates, confusion_rates, seed
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no {self.path}: the miniature world writes it; run notebook 00 first"
            )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(await request.aread())
        task = request.headers.get("X-EGM-Task", "")
        truth = self.truth(unquote(request.headers.get("X-EGM-Sample", "")))
        if truth is None:
            return httpx2.Response(
                400,
                json={"error": {"message": "the teacher does not know this sample"}},
                request=request,
            )
        prompt = "".join(
            part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text"
        )
        ways = body.get("ways")
        if ways is not None and not _are_shares(ways):
            message = f"`ways` are shares of {', '.join(WAYS)}: from 0 to 1, and 1 in all"
            return httpx2.Response(400, json={"error": {"message": message}}, request=request)
        text, finish_reason = self.answer(task, truth, prompt, body["model"], ways)
        if text is None:
            message = f"the teacher has no answer to task {task!r} for this sample"
            return httpx2.Response(400, json={"error": {"message": message}}, request=request)
        return httpx2.Response(
            200,
            request=request,
            json={
                "id": f"mini-{truth['sample_id']}",
                "object": "chat.completion",
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": finish_reason,
                        "message": {"role": "assistant", "content": text},
                    }
                ],
                "usage": {
                    "prompt_tokens": len(prompt) // 4 + 85,
                    "completion_tokens": len(text) // 4 + 1,
                },
            },
        )

    def truth(self, sample_id: str) -> dict | None:
        """The line of teacher.jsonl for a sample, read from the disk."""
        offset = self._offsets.get(_hash64(sample_id))
        if offset is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(offset)
            line = json.loads(file.readline())
        return line if line["sample_id"] == sample_id else None

    def answer(
        self,
        task: str,
        truth: Mapping,
        prompt: str,
        model: str,
        ways: Mapping[str, float] | None = None,
    ) -> tuple[str | None, str]:
        """(text, finish reason) of a reply; text None if teacher.jsonl holds none.

        ways: shares of the ways to reason (WAYS); None: every trace is worked out.
        """
        if task == "verify":
            return truth["verify"], "stop"
        if task == "failure":
            return self._judgement(truth, prompt, model), "stop"
        text = _true_text(task, truth)
        if text is not None and task in ("trace", "amodal-trace"):
            text = retell(text, _expression(prompt), self.way(truth["sample_id"], ways))
        error = self.planted_error(truth["sample_id"], task)
        if text is None or error is None:
            return text, "stop"
        if error == "refusal":
            return self._pick(REFUSALS, truth["sample_id"]), "stop"
        if error == "truncated":
            return text[: max(1, len(text) // 2)], "length"
        if error == "wrong-direction":
            return _opposite(text), "stop"
        mention = self._pick(MENTIONS, truth["sample_id"])
        return (
            f"{text.rstrip('.')} in the green box"
            if task == "amodal-expression"
            else f"{text} {mention}"
        ), "stop"

    def way(self, sample_id: str, ways: Mapping[str, float] | None) -> str:
        """How the teacher reasons about a sample, by the shares of the ways.

        A sample that is worked out stays so when the share of "worked" grows.
        """
        draw = self._uniform("way", sample_id)
        for way in WAYS if ways else ():
            if draw < ways[way]:
                return way
            draw -= ways[way]
        return "worked"

    def planted_error(self, sample_id: str, task: str) -> str | None:
        """Which error the teacher makes for a sample: a key of `error_rates[task]`, or None."""
        draw = self._uniform("error", task, sample_id)
        for kind, rate in self.error_rates.get(task, {}).items():
            if draw < rate:
                return (
                    None
                    if kind == "wrong-direction" and not self._can_reverse(sample_id, task)
                    else kind
                )
            draw -= rate
        return None

    def _can_reverse(self, sample_id: str, task: str) -> bool:
        """False for a trace that names no direction, or one and its opposite: reversed, it would
        still be right.
        """
        text = _true_text(task, self.truth(sample_id)) or ""
        _, verb, clause = text.rpartition("extend")
        named = set(_DIRECTION.findall(clause))
        return bool(verb) and named != {OPPOSITES[direction] for direction in named}

    def _judgement(self, truth: Mapping, prompt: str, model: str) -> str:
        """The planted cause, else what the prediction hit; with the judge's own errors."""
        cause = truth["planted_cause"] or _cause_of(truth, prompt)
        rate = self.confusion_rates.get(model, CONFUSION_RATE)
        if self._uniform("confusion", model, truth["sample_id"]) < rate:
            others = [name for name in CAUSES if name != cause]
            cause = others[int(self._uniform("other", model, truth["sample_id"]) * len(others))]
        return cause

    def _pick(self, choices: tuple[str, ...], sample_id: str) -> str:
        return choices[int(self._uniform("pick", sample_id) * len(choices))]

    def _uniform(self, *what: str) -> float:
        return _hash64("\n".join((str(self.seed), *what))) / 2**64

    @cached_property
    def _offsets(self) -> OffsetIndex:
        offsets, offset = OffsetIndex(), 0
        with open(self.path, "rb") as file:
            for line in file:
                offsets[_hash64(json.loads(line)["sample_id"])] = offset
                offset += len(line)
        return offsets


def _true_text(task: str, truth: Mapping) -> str | None:
    return truth[
        {
            "trace": "reasoning",
            "amodal-expression": "amodal_expression",
            "amodal-trace": "amodal_reasoning",
        }[task]
    ]


def _are_shares(ways: object) -> bool:
    if not isinstance(ways, dict) or ways.keys() != set(WAYS):
        return False
    shares = ways.values()
    return all(isinstance(s, int | float) and s >= 0 for s in shares) and isclose(sum(shares), 1)


def _expression(prompt: str) -> str:
    """The expression asked about; reads `prompts.TRACE` and `prompts.AMODAL_TRACE`."""
    return re.search(r'^  "(.+)"$', prompt, re.MULTILINE)[1]


def _opposite(text: str) -> str:
    """A trace whose last clause of extending names the opposite directions."""
    head, verb, tail = text.rpartition("extend")
    return head + verb + _DIRECTION.sub(lambda match: OPPOSITES[match[1]], tail) if verb else text


def _cause_of(truth: Mapping, prompt: str) -> str:
    """COMPLEX-PROMPT for a hit on a look-alike, SMALL-OBJECT for a tiny target, else OTHER; reads
    `prompts.FAILURE`.
    """
    width, height = map(
        int, re.search(r"^Image: (\d+) x (\d+) pixels$", prompt, re.MULTILINE).groups()
    )
    predicted = re.search(r"^Predicted box: \[(.+)\]$", prompt, re.MULTILINE)
    if predicted:
        box = tuple(map(float, predicted[1].split(",")))
        if any(iou(box, other) > 0.5 for other in truth["lookalike_boxes_px"]):
            return "COMPLEX-PROMPT"
    x1, y1, x2, y2 = truth["gt_box"]
    return "SMALL-OBJECT" if (x2 - x1) * (y2 - y1) < TINY_SHARE * width * height else "OTHER"


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
