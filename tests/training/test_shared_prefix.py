"""Reading a prompt once for a group changes neither log-probs, gradients nor greedy answers."""

from pathlib import Path

import pytest
import torch
from training_world import make_samples, store_model, stored

from egm_lib.data import open_image
from egm_lib.inference import decode_loop
from egm_lib.inference.shared_prefix import Reader, SamplingOptions, sample
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.training import prefix_logps
from egm_lib.training.model_setup import chat_text
from egm_lib.training.prefix_logps import suffix_logps

# Prompts of unlike length: padding is in play
EXPRESSIONS = ("red", "the second red square from the left", "a")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_samples(folder, images=3)
    model, processor = stored(store_model(folder / "model"))
    model.generation_config.max_length = None
    reader = Reader(processor, model, freeze_vision(model), open_image)
    images = [folder / f"{n}.png" for n in range(3)]
    texts = [chat_text(processor, [{"role": "user", "content": text}]) for text in EXPRESSIONS]
    prompts = [reader.prompt(image, text) for image, text in zip(images, texts, strict=True)]
    return model, processor, reader, images, texts, prompts


def plain_inputs(world, row: int) -> dict:
    _, processor, _, images, texts, _ = world
    return dict(processor(images=[open_image(images[row])], text=[texts[row]], return_tensors="pt"))


def plain_logps(world, row: int, completion: list[int]) -> torch.Tensor:
    """By transformers' own forward, one row at a time: nothing shared, nothing padded."""
    model, inputs = world[0], plain_inputs(world, row)
    ids = torch.cat([inputs["input_ids"], torch.tensor([completion])], dim=1)
    kind = torch.cat(
        [inputs["mm_token_type_ids"], torch.zeros(1, len(completion), dtype=torch.int)], dim=1
    )
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=kind,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
    ).logits[0]
    start = inputs["input_ids"].shape[1]
    return logits[start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_the_reader_gives_the_processor_s_tokens_and_the_model_s_positions(world):
    model, prompts = world[0], world[5]
    for row, prompt in enumerate(prompts):
        inputs = plain_inputs(world, row)
        assert prompt.ids == inputs["input_ids"][0].tolist()
        positions_3_1_T, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        assert torch.equal(prompt.positions_3_T, positions_3_1_T[:, 0])
        assert prompt.ids[prompt.image_end - 1] == model.config.vision_end_token_id


@pytest.mark.parametrize("small_logits", [0, 2**25], ids=["chunked head", "plain head"])
def test_logps_and_gradients_equal_a_plain_forward(world, monkeypatch, small_logits):
    monkeypatch.setattr(prefix_logps, "SMALL_LOGITS", small_logits)
    model, _, reader, images, _, prompts = world
    completions = [[70, 71, 72], [80, 81], [90], [91, 92, 93, 94], [60], [61, 62]]
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    width = max(map(len, completions))
    tokens = torch.tensor([c + [0] * (width - len(c)) for c in completions])
    mask = torch.tensor([[1.0] * len(c) + [0.0] * (width - len(c)) for c in completions])
    parameter = model.model.language_model.layers[0].self_attn.k_proj.weight
    got, entropy = suffix_logps(
        model, prompts, reader.features(images), group, tokens, mask, mask, entropy="value"
    )
    (got_gradient,) = torch.autograd.grad(got.sum(), parameter)
    expected = [plain_logps(world, int(g), c) for g, c in zip(group, completions, strict=True)]
    (expected_gradient,) = torch.autograd.grad(sum(e.sum() for e in expected), parameter)
    for row, values in enumerate(expected):
        torch.testing.assert_close(got[row, : len(values)], values, atol=1e-5, rtol=0)
    assert (got[mask == 0] == 0).all()
    assert (entropy[mask == 1] > 0).all()
    torch.testing.assert_close(got_gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def test_the_prefix_of_an_image_serves_several_questions(world):
    model, _, reader, images, _, prompts = world
    prompt = prompts[1]
    suffix = [*prompt.ids[prompt.image_end :], 70, 71]
    ones = torch.ones(1, len(suffix))
    features = reader.features([images[1]])
    prefix, group = [prompt.upto_image()], torch.tensor([0])
    got, _ = suffix_logps(model, prefix, features, group, torch.tensor([suffix]), ones, ones)
    torch.testing.assert_close(got[0, -2:], plain_logps(world, 1, [70, 71]), atol=1e-5, rtol=0)


def test_greedy_equals_generate_and_sampler_logps_equal_the_trainer_s(world):
    model, processor, reader, images, _, prompts = world
    eos, image = processor.tokenizer.eos_token_id, model.config.image_token_id
    options = SamplingOptions(max_new_tokens=12, temperature=0.0, suppress_ids=(image,))
    tokens, logps = sample(model, prompts, reader.features(images), 2, options, [eos])
    for row, (ids, values) in enumerate(zip(tokens, logps, strict=True)):
        inputs = plain_inputs(world, row // 2)
        expected = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[image]
        )
        assert ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
        torch.testing.assert_close(
            torch.tensor(values), plain_logps(world, row // 2, ids).detach(), atol=1e-4, rtol=0
        )


def test_sampling_ends_rows_at_any_end_token_and_keeps_their_order(world):
    model, _, reader, images, _, prompts = world
    # A quarter of the bytes end an answer: rows leave the batch at unlike times
    ends = list(range(0, 256, 4))
    torch.manual_seed(0)
    tokens, logps = sample(model, prompts, reader.features(images), 16, SamplingOptions(10), ends)
    assert len(tokens) == 48 and {len(ids) for ids in tokens} >= {1, 2, 3}
    for row, (ids, values) in enumerate(zip(tokens, logps, strict=True)):
        assert len(ids) == len(values) <= 10
        assert not set(ids[:-1]) & set(ends) and (ids[-1] in ends or len(ids) == 10)
        if row % 7 == 0:
            torch.testing.assert_close(
                torch.tensor(values), plain_logps(world, row // 16, ids).detach(), atol=1e-4, rtol=0
            )


def test_the_loop_ends_with_the_longest_completion(world, monkeypatch):
    model, _, reader, images, _, prompts = world
    steps = []
    monkeypatch.setattr(
        decode_loop, "_pick", lambda *args, pick=decode_loop._pick: steps.append(1) or pick(*args)
    )
    torch.manual_seed(0)
    ends = list(range(0, 256, 20))  # rows end one by one, too few at a time to leave the batch
    tokens, _ = sample(model, prompts, reader.features(images), 8, SamplingOptions(120), ends)
    assert len(steps) == max(map(len, tokens)) < 120


def test_draws_follow_the_distribution_within_top_k_and_top_p():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    torch.manual_seed(0)
    token = decode_loop._pick(logits, SamplingOptions(1, temperature=0.5), None)
    expected = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(
        token.bincount(minlength=5) / len(token), expected, atol=0.015, rtol=0
    )
    cut = {"top_k": {"top_k": 2}, "top_p": {"top_p": 0.7}}
    seen = {
        name: set(decode_loop._pick(logits, SamplingOptions(1, **cut[name]), None).tolist())
        for name in cut
    }
    assert seen == {"top_k": {0, 1}, "top_p": {0, 1}}  # p = .64, .23, .09, .03, .01
    logits[:, [0, 4]] = -torch.inf
    assert set(decode_loop._pick(logits, SamplingOptions(1), None).tolist()) == {1, 2, 3}


def test_an_image_file_is_opened_once(world):
    model, processor, _, images, texts, _ = world
    opened: list[Path] = []

    def spy(path):
        opened.append(path)
        return open_image(path)

    reader = Reader(processor, model, freeze_vision(model), spy)
    for _ in range(3):
        reader.features([*images, *images])
        reader.prompt(images[0], texts[0])
    assert opened == images
