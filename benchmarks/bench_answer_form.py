"""Time of one bound token (answers without reasoning, Table 10), with the vocabulary of Qwen3-VL.

    python benchmarks/bench_answer_form.py [--repeats 20] [--family qwen3-vl]

The plain scan is what the form is compared with: the tokens in order of likelihood, each decoded
with all that was written and matched, first the 64 likeliest and then all. Both choose the same
token from the same random logits, to which no answer is likely: the hard case. Last, every token of
a whole answer in turn. Goal: a whole answer at least 20 times as fast.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import regex
import torch
from transformers import AutoTokenizer

from egm_lib.inference.answer_form import ANSWER_PATTERNS, AnswerForm, Pieces
from egm_lib.pipeline.rehearsal.tokenizer import write_internvl3_tokenizer, write_qwen3vl_tokenizer

VOCAB_SIZE = 151_936  # rows of Qwen3-VL's head; more than it has tokens
WRITERS = {"qwen3-vl": write_qwen3vl_tokenizer, "internvl-3": write_internvl3_tokenizer}
BOX = '[{"bbox_2d": [12, 30, 400, 999]'
STATES = {
    "qwen3-vl": {
        "nothing yet": "",
        "in a key": '[{"bbox_',
        "before a number": '[{"bbox_2d": [',
        "in a number": '[{"bbox_2d": [1',
        "after a number": '[{"bbox_2d": [1000',
        "in a label": BOX + ', "label": "the man',
        "in a character of a label": BOX + ', "label": "caf\u00e9',  # without its last byte
        "after a box": BOX,
        "at the end": BOX + "}]",
    },
    "internvl-3": {
        "nothing yet": "",
        "in a reference": "<answer><ref>the man",
        "in a number": "<box>[[1",
        "after a box": "<box>[[1, 2, 3, 4]]",
        "at the end": "<box>[[1, 2, 3, 4]]</box></answer>",
    },
}

ANSWERS = {
    "qwen3-vl": BOX + ', "label": "the man in a red coat left of the door"}]',
    "internvl-3": "<box>[[12, 30, 400, 999]]</box></answer>",
}


def scan(
    pattern: regex.Pattern, tokenizer, eos_id: int, written: list[int], logits_V: torch.Tensor
) -> int:
    """The likeliest admissible token, found token by token."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before = decode(written)
    for width in (64, logits_V.numel()):
        for token in torch.topk(logits_V, width).indices.tolist():
            if token == eos_id:
                if pattern.fullmatch(before):
                    return token
                continue
            text = decode([*written, token])
            if text != before and pattern.fullmatch(text, partial=True):
                return token
    raise ValueError(f"no token continues {before!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--family", choices=list(STATES), default="qwen3-vl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[args.family](Path(folder), "")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    pattern, eos_id = ANSWER_PATTERNS[args.family], tokenizer.eos_token_id
    began = time.perf_counter()
    form = AnswerForm(pattern, tokenizer.decode, frozenset([eos_id]), Pieces.of(tokenizer))
    print(f"{args.family}: the bytes of all tokens take {time.perf_counter() - began:.2f} s, once")
    compiled, generator = regex.compile(pattern), torch.Generator().manual_seed(0)

    def times_ms(written: list[int]) -> tuple[float, float]:
        """Of one token by the scan and by the form; raises SystemExit if they choose others."""
        logits_V = torch.randn(VOCAB_SIZE, generator=generator)
        logits_V[len(tokenizer) :] = -torch.inf
        start = time.perf_counter()
        expected = scan(compiled, tokenizer, eos_id, written, logits_V)
        between = time.perf_counter()
        bound_V = form.bind(written, logits_V, 1)
        end = time.perf_counter()
        if (chosen := int(bound_V.argmax())) != expected:
            text = tokenizer.decode(written)
            raise SystemExit(f"after {text!r}: {expected} by the scan, {chosen} by the form")
        return 1000 * (between - start), 1000 * (end - between)

    def report(name: str, measured: list[tuple[float, float]]) -> None:
        plain, ours = (median(column) for column in zip(*measured, strict=True))
        print(f"{name:28s} {plain:9.2f} ms, {ours:6.2f} ms: {plain / ours:7.1f} times as fast")

    for name, text in STATES[args.family].items():
        written = tokenizer(text)["input_ids"]
        if name == "in a character of a label":
            written = [*tokenizer(text[:-1])["input_ids"], *_first_byte(tokenizer, text[-1])]
        report(name, [times_ms(written) for _ in range(args.repeats)])
    answer = tokenizer(ANSWERS[args.family])["input_ids"]
    whole = []
    for _ in range(min(args.repeats, 5)):
        tokens = [times_ms(answer[:end]) for end in range(len(answer) + 1)]
        whole.append(tuple(map(sum, zip(*tokens, strict=True))))
    report(f"an answer of {len(answer)} tokens", whole)


def _first_byte(tokenizer, character: str) -> list[int]:
    """The token that is the first byte of a character of several."""
    letters = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(character)[0][0]
    return [tokenizer.convert_tokens_to_ids(letters[0])]


if __name__ == "__main__":
    main()
