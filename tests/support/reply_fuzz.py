"""Chat completions mutated at random, as trees and as bytes, for the one reader of replies."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

from openai.types.chat import ChatCompletion

from egm_lib.curation.replies import ChatReply, read_reply, read_stream

WHOLE = {
    "id": "r-1",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {
                "role": "assistant",
                "content": [{"type": "text", "text": "<think>a</think> [1, 2, 3, 4]"}],
                "reasoning_content": "the second \u2028 from the left",
                "refusal": None,
                "tool_calls": [],
            },
        }
    ],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "completion_tokens_details": {"reasoning_tokens": 12},
    },
    "error": None,
}
CHUNKS = [
    {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"id": "c", "choices": [{"index": 0, "delta": {"reasoning": "the left one"}}]},
    {"id": "c", "choices": [{"index": 0, "delta": {"content": "[1, 2,"}}]},
    {"id": "c", "choices": [{"index": 0, "delta": {"content": " 3, 4]"}, "finish_reason": "stop"}]},
    {"id": "c", "choices": [], "usage": WHOLE["usage"]},
]
ODD = (
    *(None, True, 0, -1, 2**31, 10**30, 1.5, float("nan"), float("inf")),
    *("", " ", "stop", "length", "SAFETY", "\ud83d", "\udc00\x00", "\u2028", "<html>", "x" * 5000),
    *([], {}, [None], [[]], [{}], {"error": "no"}, {"message": None}, {"text": 1}, {"type": []}),
    *({"type": "text", "text": ["a"]}, {"type": "thinking", "thinking": 3}, {"content": {}}),
)


def fuzz(count: int, rng: random.Random) -> Counter[str]:
    """Read `count` mutated replies and check each; returns how they finished."""
    finishes: Counter[str] = Counter()
    for _ in range(count):
        if rng.random() < 0.5:
            reply = read_reply(_form(mutated(WHOLE, rng), rng))
        else:
            reply = read_stream([_form(part, rng) for part in mutated(CHUNKS, rng, whole=False)])
        check(reply)
        finishes[reply.finish] += 1
    return finishes


def check(reply: ChatReply) -> None:
    """What holds of every reply, whatever the body was."""
    assert reply.finish in ("stop", "length", "error")
    assert (reply.error is not None) == (reply.finish == "error")
    for text in (reply.text, reply.reasoning, reply.error, reply.refusal, reply.response_id):
        assert text is None or isinstance(text, str)
        (text or "").encode()  # can be written
    assert reply.reasoning != "" and "\n" not in (reply.error or "")
    for tokens in (reply.prompt_tokens, reply.reasoning_tokens, reply.answer_tokens):
        assert tokens is None or (type(tokens) is int and 0 <= tokens < 2**31)


def mutated(tree: object, rng: random.Random, *, whole: bool = True) -> object:
    """A copy with one to four places changed; whole: whether the tree itself may be replaced."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 4)):
        spots = list(_spots(tree))
        if not spots or (whole and rng.random() < 0.02):
            return copy.deepcopy(rng.choice(ODD)) if whole else tree
        parent, key = rng.choice(spots)
        change = rng.randrange(4)
        if change == 0:
            del parent[key]
        elif change == 1:  # a part of the tree in a place where it does not belong
            source, other = rng.choice(spots)
            try:
                parent[key] = copy.deepcopy(source[other])
            except (KeyError, IndexError):
                parent[key] = None
        elif change == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(rng.choice(ODD)))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _spots(tree: object) -> list[tuple[object, object]]:
    """(parent, key) of every value in a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    spots = [(tree, key) for key in keys]
    for key in keys:
        if isinstance(tree[key], dict | list):
            spots += _spots(tree[key])
    return spots


def _form(body: object, rng: random.Random) -> object:
    """The body as an object, as text, or as bytes with bytes changed, cut or spliced."""
    form = rng.randrange(5)
    if form == 0:
        return body
    if form == 1 and isinstance(body, dict):
        return ChatCompletion.construct(**body)
    raw = bytearray(json.dumps(body).encode())
    if form == 2:
        return raw.decode()
    if form == 3:
        del raw[rng.randrange(len(raw)) :]
    for _ in range(rng.randint(1, 5)):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)
