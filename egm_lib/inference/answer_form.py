"""Answers bound to the family's form, for answers without reasoning (Table 10)."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import regex
import torch
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from egm_lib.errors import EgmError

# No \d, which takes the digits of all scripts
_NUMBER = r"(?:0|[1-9][0-9]{0,2}|1000)"
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
    """Keeps to tokens that continue a text of the form.

    pattern: must treat all characters beyond ASCII alike. decode: the text of token ids. pieces:
    the bytes of each token, for tokenizers where a text is its tokens' bytes joined; None: every
    token that is tried is decoded with all that was written.
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
        if self.pieces is None:
            tokens = self._decoded(written, logits_V)
        else:
            tokens = self._walked(self.pieces, written, logits_V, keep)
        allowed = list(islice(tokens, keep))
        bound_V = torch.full_like(logits_V, -torch.inf)
        if allowed:
            bound_V[allowed] = logits_V[allowed]
        else:
            bound_V[list(self.eos_ids)] = 0.0
        return bound_V

    def _continues(self, text: str) -> bool:
        return self.pattern.fullmatch(text, partial=True) is not None

    def _ends(self, text: str) -> bool:
        return self.pattern.fullmatch(text) is not None

    def _decoded(self, written: list[int], logits_V: torch.Tensor) -> Iterator[int]:
        """Admissible tokens in order of likelihood: each token is decoded and tried."""
        before, logits_V = self.decode(written), logits_V.cpu()
        for token in torch.argsort(logits_V, descending=True, stable=True).tolist():
            if not logits_V[token] > -torch.inf:
                continue
            if token in self.eos_ids:
                if self._ends(before):
                    yield token
                continue
            text = self.decode([*written, token])
            if len(text) > len(before) and self._continues(text):
                yield token

    def _walked(
        self, pieces: "Pieces", written: list[int], logits_V: torch.Tensor, keep: int
    ) -> Iterator[int]:
        """The same by a walk through the tokens' bytes, which leaves out what begins badly."""
        before = pieces.joined(written)
        logits_V = logits_V.detach().float().cpu().numpy()  # whose argmax takes a tenth of torch's

        def continues(piece: bytes) -> bool:
            # A character that is not whole yet reads as U+FFFD, which is beyond ASCII too
            return self._continues((before + piece).decode("utf-8", "replace"))

        if keep == 1:  # greedy: mostly the likeliest token of all will do
            likeliest = int(logits_V.argmax())
            piece = b"" if likeliest in self.eos_ids else pieces.piece(likeliest)
            if piece and logits_V[likeliest] > -np.inf and continues(piece):
                return iter([likeliest])
        ended = self._ends(before.decode("utf-8", "replace"))
        return pieces.likeliest(logits_V, continues, self.eos_ids, self.eos_ids if ended else ())


class Pieces:
    """The bytes of every token of a byte-level tokenizer, sorted, so that the tokens that begin
    with the same bytes are a range: a trie that is never built.
    """

    def __init__(self, pieces: Sequence[bytes]):
        """pieces: by token; empty for an id without a token."""
        self._by_token = pieces
        order = sorted((piece, token) for token, piece in enumerate(pieces) if piece)
        self._sorted = [piece for piece, _ in order]
        self._tokens_N = np.array([token for _, token in order])
        self._place_of = {token: place for place, (_, token) in enumerate(order)}
        self._lengths_N = np.array([len(piece) for piece in self._sorted])
        # numpy pads with zeros; what lies beyond a length is never looked at
        self._bytes_N_L = np.array(self._sorted, "S").view(np.uint8).reshape(len(order), -1)
        self._starts: dict[tuple[int, int, int], tuple[int, np.ndarray]] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Pieces | None":
        """Those of a tokenizer; None where texts are more than their tokens' bytes joined."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(getattr(backend, "decoder", None), ByteLevel):
            return None
        letters = {ord(letter): byte for byte, letter in bytes_to_unicode().items()}
        texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        return cls([_bytes_of(text or "", letters) for text in texts])

    def piece(self, token: int) -> bytes:
        """Empty for a row of the model's head without a token, as Qwen's has some."""
        return self._by_token[token] if token < len(self._by_token) else b""

    def joined(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self.piece, tokens))

    def likeliest(
        self,
        logits_V: np.ndarray,
        continues: Callable[[bytes], bool],
        eos_ids: frozenset[int],
        ends: Iterable[int],
    ) -> Iterator[int]:
        """Tokens in order of likelihood: those of `ends`, and others whose bytes `continues` takes.

        continues: must take the beginnings of all that it takes. eos_ids: tokens that stand for no
        text.
        """
        # A tokenizer may have tokens for which the head has no row: InternVL-3's "<video>"
        padding = max(0, len(self._by_token) - len(logits_V))
        logits_N = np.pad(logits_V, (0, padding), constant_values=-np.inf)[self._tokens_N]
        logits_N[[self._place_of[token] for token in eos_ids if token in self._place_of]] = -np.inf
        # A best-first search: (-logit, token, range, depth). A token that was found has no range;
        # of equal logits, ranges come first and then the lowest token.
        heap = [(-float(logits_V[token]), token, None, 0) for token in ends]
        heap = [entry for entry in heap if entry[0] < np.inf]
        heap.append((-np.inf, -1, (0, len(self._sorted)), 0))
        heapq.heapify(heap)
        while heap:
            negative, token, span, depth = heapq.heappop(heap)
            if span is None:
                yield token
                continue
            low, high = span
            if high - low == 1:
                if continues(self._sorted[low]):
                    heapq.heappush(heap, (negative, int(self._tokens_N[low]), None, 0))
                continue
            if depth and not continues(self._sorted[low][:depth]):
                continue
            whole, starts = self._children(low, high, depth)
            for place in range(low, whole):  # tokens that end here
                if logits_N[place] > -np.inf:
                    entry = (-float(logits_N[place]), int(self._tokens_N[place]), None, 0)
                    heapq.heappush(heap, entry)
            if not len(starts):
                continue
            # Not a number counts as impossible
            best = np.fmax.reduceat(logits_N[:high], starts).tolist()
            bounds = [*starts.tolist(), high]
            for logit, first, last in zip(best, bounds, bounds[1:], strict=False):
                if logit > -np.inf:
                    heapq.heappush(heap, (-logit, -1, (first, last), depth + 1))

    def _children(self, low: int, high: int, depth: int) -> tuple[int, np.ndarray]:
        """Of a range of tokens with the same `depth` first bytes: where those end that have no
        more bytes, and where each range begins that shares one more.
        """
        key = (low, high, depth)
        if key not in self._starts:
            whole = low + int(np.searchsorted(self._lengths_N[low:high] > depth, True))
            next_bytes = self._bytes_N_L[whole:high, depth] if whole < high else np.empty(0)
            changes = np.flatnonzero(next_bytes[1:] != next_bytes[:-1]) + 1 + whole
            starts = np.concatenate([[whole], changes]) if whole < high else changes
            self._starts[key] = whole, starts.astype(np.intp)
        return self._starts[key]


def _bytes_of(text: str, letters: Mapping[int, int]) -> bytes:
    """The bytes of a token as the vocabulary writes it, a letter a byte.

    An added token with other characters is written as it is.
    """
    if letters.keys() >= set(map(ord, text)):
        return text.translate(letters).encode("latin-1")
    return text.encode("utf-8")
