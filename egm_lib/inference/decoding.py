"""Other ways to decode, for ablations that the paper lacks: limits, votes and single samples.

`predict --model` takes names such as `small-egm@budget-16` (at most 16 tokens of reasoning),
`small-egm@majority-8` (a vote of 8 samples) and `small-egm@sample-3` (the third sample).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from egm_lib.boxes import Box, pairwise_iou
from egm_lib.errors import InputError
from egm_lib.inference.engine import WINDOW_BATCHES, Answer, Engine, Request
from egm_lib.parsing import parse_completion, split_reasoning
from egm_lib.profile import PROMPTED, Sampling

VOTE_TEMPERATURE = 0.7  # that of the paper's rollouts, Table 6
# Distance between the seeds of two samples, so that those of different runs never coincide.
SEEDS_OF_SAMPLES = 1000


def decoded_as(engine: Engine, model: str) -> Engine:
    """The engine, or the variant of it that the model's name asks for.

    A name that asks for another prompt (`from_profile.prompt_of`) decodes as the engine does.
    Raises InputError for an unknown variant.
    """
    _, _, variant = model.partition("@")
    if not variant or variant.startswith(PROMPTED):
        return engine
    kind, _, number = variant.partition("-")
    variants = {"budget": ReasoningBudget, "majority": Majority, "sample": Sample}
    if kind not in variants or not number.isdigit() or int(number) < 1:
        known = "budget-N (tokens), majority-N (samples), sample-N (the N-th sample) or prompt-NAME"
        raise InputError(f"unknown variant {variant!r} in {model!r}: use {known}")
    return variants[kind](engine, int(number))


class _Variant:
    window_batches = WINDOW_BATCHES  # some variants ask an engine several times

    def __init__(self, engine: Engine, number: int):
        self.engine, self.number = engine, number
        self.family, self.revision = engine.family, engine.revision

    @property
    def batch_size(self) -> int:
        return self.engine.batch_size

    @batch_size.setter
    def batch_size(self, number: int) -> None:
        self.engine.batch_size = number

    def close(self) -> None:
        self.engine.close()

    def describe(self) -> dict:
        return {
            **self.engine.describe(),
            "decoding": f"{type(self).__name__.lower()}-{self.number}",
        }


class ReasoningBudget(_Variant):
    """Closes the reasoning after `number` tokens, so that the model must answer."""

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        short = replace(sampling, max_new_tokens=min(self.number, sampling.max_new_tokens))
        answers = list(self.engine.answer(requests, short, reasoning=reasoning))
        going = [i for i, answer in enumerate(answers) if answer.finish_reason == "length"]
        longer = [replace(requests[i], begun=self._begun(answers[i].raw_answer)) for i in going]
        for i, rest in zip(going, self.engine.answer(longer, sampling), strict=True):
            first = answers[i]
            if rest.error is None:
                done = first.reasoning_tokens, first.answer_tokens
                if _is_reasoning(first.raw_answer):
                    done = _total(*done), 0
                rest = replace(
                    rest,
                    prompt_tokens=first.prompt_tokens,
                    reasoning_tokens=_total(done[0], rest.reasoning_tokens),
                    answer_tokens=_total(done[1], rest.answer_tokens),
                )
            answers[i] = rest
        yield from answers

    def _begun(self, raw_answer: str) -> str:
        """The assistant's text so far, without the opener, which the chat template writes again."""
        closing = "</think>" if not self.family.reasoning_opener else "\n</think>\n\n"
        return raw_answer.removeprefix(self.family.reasoning_opener) + (
            closing if _is_reasoning(raw_answer) else ""
        )


def _is_reasoning(raw_answer: str) -> bool:
    return split_reasoning(raw_answer)[1] is None


class Majority(_Variant):
    """Samples `number` answers and returns the one whose box most others overlap (IoU > 0.5).

    The token counts are the sums over all samples.
    """

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        warm = replace(sampling, temperature=VOTE_TEMPERATURE)
        seed, rounds = self.engine.seed, []
        for number in range(self.number):
            self.engine.seed = seed + number
            rounds.append(list(self.engine.answer(requests, warm, reasoning=reasoning)))
        self.engine.seed = seed
        for request, answers in zip(requests, zip(*rounds, strict=True), strict=True):
            frame, image_wh = self.family.frame, request.image.size
            given = [answer for answer in answers if answer.error is None]
            if not given:
                yield answers[0]
                continue
            boxes = [
                parse_completion(answer.raw_answer, frame=frame, image_wh=image_wh).box
                for answer in given
            ]
            yield replace(
                given[most_agreed(boxes)],
                reasoning_tokens=_total(*(answer.reasoning_tokens for answer in given)),
                answer_tokens=_total(*(answer.answer_tokens for answer in given)),
            )


class Sample(_Variant):
    """The `number`-th sampled answer, at temperature 1 and without top-k and top-p.

    It is drawn from the distribution of the model itself. Several samples give pass@N.
    """

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        free = replace(sampling, temperature=1.0, top_p=1.0, top_k=None)
        seed = self.engine.seed
        self.engine.seed = seed + SEEDS_OF_SAMPLES * self.number
        try:
            yield from self.engine.answer(requests, free, reasoning=reasoning)
        finally:
            self.engine.seed = seed


def _total(*counts: int | None) -> int | None:
    """The sum; None if one of the counts is not known."""
    return None if None in counts else sum(counts)


def most_agreed(boxes: Sequence[Box | None]) -> int:
    """Index of the box that most of the others overlap (IoU > 0.5); 0 if there is no box.

    Of several such boxes it is the first.
    """
    known = [index for index, box in enumerate(boxes) if box is not None]
    if not known:
        return 0
    found = [boxes[index] for index in known]
    votes = (pairwise_iou(found, found) > 0.5).sum(axis=1)
    return known[int(votes.argmax())]
