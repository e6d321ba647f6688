"""Answers bound to the family's form, for answers without reasoning (Table 10)."""

from collections.abc import Callable, Sequence

import regex
import torch
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

from egm_lib.errors import EgmError

_NUMBER = r"(?:0|[1-9]\d{0,2}|1000)"
# No "<": a label must not write protocol tags
_LABEL = r'(?:[^"\\<\x00-\x1f]|\\["\\/bfnrt]){0,200}'
_BOX = rf"\[{_NUMBER}(?:, ?{_NUMBER}){{3}}\]"
_OBJECT = rf'\{{"bbox_2d": ?{_BOX}(?:, ?"label": ?"{_LABEL}")?\}}'
ANSWER_PATTERNS = {
    "qwen3-vl": rf"(?:```json\n)?\[[ \n\t]{{0,2}}{_OBJECT}[ \n\t]{{0,2}}\](?:\n```)?",
    "internvl-3": (
        r"(?:<answer>)?(?:<ref>[^<\n]*</ref>)?"  # vLLM cannot compile a bounded repetition in time
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
    """Keeps to tokens that continue a text of the form, tried in order of likelihood.

    pieces: the text of each token, for tokenizers where a text is its tokens' texts joined (byte
    level). Whole groups of tokens with the same first character are then ruled out at once. None:
    every token that is tried is decoded with all that was written.
    """

    def __init__(
        self,
        pattern: str,
        decode: Callable[[list[int]], str],
        eos_ids: frozenset[int],
        pieces: "Pieces | None" = None,
    ):
        self.pattern, self.decode, self.eos_ids = regex.compile(pattern), decode, eos_ids
        self.pieces = pieces

    def bind(self, written: list[int], logits_V: torch.Tensor, keep: int) -> torch.Tensor:
        """logits_V with all but the `keep` likeliest admissible tokens at -inf.

        A vocabulary of words (the miniature's) can come to where none is admissible: the answer
        ends there.
        """
        before = self.decode(written)
        # U+FFFD: the last character is not whole, and the next token may change it
        pieces = None if before.endswith("\ufffd") else self.pieces
        # Mostly one of the likeliest will do
        allowed = self._admissible(_likeliest(logits_V, 64), written, before, keep, pieces)
        if len(allowed) < keep:
            tried_V = logits_V
            if pieces is not None:
                possible_V = self._possible(pieces, before, logits_V)
                tried_V = logits_V.masked_fill(~possible_V, -torch.inf)
            tokens = _likeliest(tried_V, tried_V.numel())
            allowed = self._admissible(tokens, written, before, keep, pieces)
        bound_V = torch.full_like(logits_V, -torch.inf)
        if allowed:
            bound_V[allowed] = logits_V[allowed]
        else:
            bound_V[list(self.eos_ids)] = 0.0
        return bound_V

    def _possible(self, pieces: "Pieces", before: str, logits_V: torch.Tensor) -> torch.Tensor:
        """Which tokens begin with a character that may follow, or end the answer."""
        may_follow = torch.tensor(
            [
                bool(char) and bool(self.pattern.fullmatch(before + char, partial=True))
                for char in pieces.first_chars
            ]
        )
        possible_V = torch.zeros(logits_V.shape, dtype=torch.bool)  # some rows have no token
        possible_V[: len(pieces.texts)] = may_follow[pieces.first_V]
        possible_V[list(self.eos_ids)] = True
        return possible_V.to(logits_V.device)

    def _admissible(
        self,
        tokens: list[int],
        written: list[int],
        before: str,
        keep: int,
        pieces: "Pieces | None",
    ) -> list[int]:
        allowed: list[int] = []
        for token in tokens:
            if token in self.eos_ids:
                good = self.pattern.fullmatch(before)
            elif pieces and token >= len(pieces.texts):
                good = False  # a row of the head without a token, as Qwen's vocabulary has some
            else:
                text = before + pieces.texts[token] if pieces else self.decode([*written, token])
                good = len(text) > len(before) and self.pattern.fullmatch(text, partial=True)
            if good:
                allowed.append(token)
                if len(allowed) == keep:
                    break
        return allowed


def _likeliest(logits_V: torch.Tensor, number: int) -> list[int]:
    """Tokens in order of likelihood, without the impossible ones."""
    tokens = torch.topk(logits_V, min(number, logits_V.numel())).indices
    return tokens[logits_V[tokens] > -torch.inf].tolist()


class Pieces:
    """The text of every token, and the tokens by their first character.

    first_V: of each token, the index of its first character in first_chars ("": no text).
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        indices: dict[str, int] = {}
        self.first_V = torch.tensor([indices.setdefault(text[:1], len(indices)) for text in texts])
        self.first_chars = list(indices)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Pieces | None":
        """Those of a tokenizer; None where texts are more than their tokens' texts joined."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(getattr(backend, "decoder", None), ByteLevel):
            return None
        ids = [[token] for token in range(len(tokenizer))]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return cls(tokenizer.batch_decode(ids, **options))
