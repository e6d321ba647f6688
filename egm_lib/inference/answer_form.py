"""Answers bound to the family's form, for answers without reasoning (Table 10)."""

from collections.abc import Callable

import regex
import torch

from egm_lib.errors import EgmError

_NUMBER = r"(?:0|[1-9]\d{0,2}|1000)"
# No "<": a label must not write protocol tags
_LABEL = r'(?:[^"\\<\x00-\x1f]|\\["\\/bfnrt]){0,200}'
_BOX = rf"\[{_NUMBER}(?:, ?{_NUMBER}){{3}}\]"
_OBJECT = rf'\{{"bbox_2d": ?{_BOX}(?:, ?"label": ?"{_LABEL}")?\}}'
ANSWER_PATTERNS = {
    "qwen3-vl": rf"(?:```json\n)?\[[ \n\t]{{0,2}}{_OBJECT}[ \n\t]{{0,2}}\](?:\n```)?",
    "internvl-3": (
        r"(?:<answer>)?(?:<ref>[^<\n]{0,200}</ref>)?"
        rf"<box>\[?{_BOX}\]?</box>(?:</answer>)?"
    ),
}
# The same for endpoints that take JSON schemas; a family that answers in tags has the pattern alone
ANSWER_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "bbox_2d": {
                "type": "array",
                "minItems": 4,
                "maxItems": 4,
                "items": {"type": "integer", "minimum": 0, "maximum": 1000},
            },
            "label": {"type": "string", "maxLength": 200},
        },
        "required": ["bbox_2d", "label"],
        "additionalProperties": False,
    },
}


class ConstraintIgnored(EgmError, RuntimeError):
    """An engine that was told to bind the output answered outside the form."""


def check_bound(text: str, pattern: str, *, finished: bool) -> None:
    """Raise ConstraintIgnored unless text has the form (an answer that was cut off: the beginning
    of the form).
    """
    if not regex.fullmatch(pattern, text.strip(), partial=not finished):
        raise ConstraintIgnored(
            f"asked for an answer of a fixed form, got {text[:80]!r}: this engine ignores "
            "structured output; "
            "update it or leave out the row without reasoning"
        )


class AnswerForm:
    """Keeps to tokens that continue a text of the form; in order of likelihood, so few of the
    vocabulary are tried.
    """

    def __init__(self, pattern: str, decode: Callable[[list[int]], str], eos_ids: frozenset[int]):
        self.pattern, self.decode, self.eos_ids = regex.compile(pattern), decode, eos_ids

    def bind(self, written: list[int], logits_V: torch.Tensor, keep: int) -> torch.Tensor:
        """logits_V with all but the `keep` likeliest admissible tokens at -inf.

        A vocabulary of words (the miniature's) can come to where none is admissible: the answer
        ends there.
        """
        before = self.decode(written)
        allowed: list[int] = []
        for width in (64, logits_V.numel()):
            tokens = torch.topk(logits_V, min(width, logits_V.numel())).indices.tolist()
            allowed = self._admissible(tokens, written, before, keep)
            allowed = [token for token in allowed if logits_V[token] > -torch.inf]
            if len(allowed) >= keep:
                break
        bound_V = torch.full_like(logits_V, -torch.inf)
        if allowed:
            bound_V[allowed] = logits_V[allowed]
        else:
            bound_V[list(self.eos_ids)] = 0.0
        return bound_V

    def _admissible(
        self, tokens: list[int], written: list[int], before: str, keep: int
    ) -> list[int]:
        allowed: list[int] = []
        for token in tokens:
            if token in self.eos_ids:
                good = self.pattern.fullmatch(before)
            else:
                text = self.decode([*written, token])
                good = len(text) > len(before) and self.pattern.fullmatch(text, partial=True)
            if good:
                allowed.append(token)
                if len(allowed) == keep:
                    break
        return allowed
