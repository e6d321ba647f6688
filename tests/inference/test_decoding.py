"""Other ways to decode: a cap on the reasoning, and a vote of samples."""

from dataclasses import replace

import pytest
from engine_world import GREEDY
from PIL import Image

from egm_lib.inference.decoding import decoded_as, most_agreed
from egm_lib.inference.engine import Answer, Request
from egm_lib.prompts import FAMILIES


class Thinker:
    """Thinks for 10 tokens ("a " each), then answers in 3; continues an answer that was begun.

    boxes: its sampled answers, by seed.
    """

    family, revision, batch_size = FAMILIES["qwen3-vl"], None, 4
    window_batches = 1

    def __init__(self, boxes=()):
        self.seed, self.boxes = 0, boxes

    def describe(self):
        return {"engine": "fake"}

    def answer(self, requests, sampling, *, reasoning=True):
        for request in requests:
            thought = [] if "</think>" in request.begun else ["a "] * 10 + ["</think>"]
            box = self.boxes[self.seed] if sampling.temperature > 0 else [0, 0, 500, 500]
            words = thought + ([f"[{box}"[:-1], "]", "]"] if box else ["none", ".", "."])
            written = words[: sampling.max_new_tokens]
            num_reasoning = len(thought) if len(written) >= len(thought) else 0
            finish = "stop" if len(written) == len(words) else "length"
            text = "<think>\n" + request.begun + "".join(written)
            yield Answer(text, 5, num_reasoning, len(written) - num_reasoning, finish)


def test_a_budget_closes_the_reasoning_and_counts_its_tokens():
    requests = [Request(Image.new("RGB", (10, 10)), "find")]
    [answer] = decoded_as(Thinker(), "small-egm@budget-4").answer(requests, GREEDY)
    assert answer.raw_answer == "<think>\na a a a \n</think>\n\n[[0, 0, 500, 500]]"
    assert (answer.reasoning_tokens, answer.answer_tokens, answer.finish_reason) == (4, 3, "stop")
    long = replace(GREEDY, max_new_tokens=50)
    [plain] = Thinker().answer(requests, long)
    assert list(decoded_as(Thinker(), "small-egm@budget-40").answer(requests, long)) == [plain]
    # Cut within the answer
    [cut] = decoded_as(Thinker(), "small-egm@budget-12").answer(requests, long)
    assert (cut.reasoning_tokens, cut.answer_tokens) == (11, 4)


def test_a_majority_outvotes_a_stray_sample():
    near, far = [0, 0, 500, 500], [600, 600, 900, 900]
    requests = [Request(Image.new("RGB", (10, 10)), "find")]
    thinker = Thinker([far, near, None, [0, 0, 500, 480]])
    [answer] = decoded_as(thinker, "small-egm@majority-4").answer(
        requests, replace(GREEDY, max_new_tokens=50)
    )
    assert answer.raw_answer.endswith("[[0, 0, 500, 500]]") and thinker.seed == 0
    assert answer.reasoning_tokens == 44 and answer.answer_tokens == 12
    assert most_agreed([None, None]) == 0


def test_each_sample_is_drawn_at_temperature_1_with_another_seed():
    """pass@N of N equal samples would be accuracy again."""
    asked = []

    class Recorder(Thinker):
        def answer(self, requests, sampling, *, reasoning=True):
            asked.append((self.seed, sampling.temperature, sampling.top_k, sampling.top_p))
            return iter(())

    engine = Recorder()
    for number in (1, 2):
        list(decoded_as(engine, f"small-egm@sample-{number}").answer([], GREEDY))
    assert [rest for _, *rest in asked] == [[1.0, None, 1.0]] * 2
    assert len({seed for seed, *_ in asked}) == 2 and engine.seed == 0


@pytest.mark.parametrize("name", ["small-egm@beam-4", "small-egm@budget", "small-egm@majority-0"])
def test_an_unknown_way_of_decoding_is_refused(name):
    with pytest.raises(ValueError, match="unknown variant"):
        decoded_as(Thinker(), name)
