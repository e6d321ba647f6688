"""Fits a stand-in for some seconds, so that it writes boxes in its family's answer form.

Noise alone would earn no reward, and GRPO would have no gradient. A fitted stand-in writes boxes
nearly as large as the image, whatever it shows. They overlap every true box, each by another share,
so that the rewards of a group differ. It reads real prompts with images throughout.

Only the layers of the language model, and the head's rows of the tokens that answers are made of,
are fitted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from egm_lib.pipeline.rehearsal.annotations import HEIGHT, WIDTH, Shape, draw, scene
from egm_lib.prompts import Family

STEPS, ROWS, LEARNING_RATE = 60, 16, 2e-2  # some seconds of one core; AdamW
NUM_PROMPTS, NUM_ANSWERS = 32, 256
# Questions of several lengths: a stand-in that knows one length counts its own words from there
EXPRESSIONS = ("{}", "{} far left", "{} in the middle", "the partly hidden {} behind another shape")
# Left, top, right and bottom of a box, as shares of the image: near its edges, since shapes stand
# there, too. Each side has values of its own, of equally many digits, so that the side before tells
# which one follows. That is soon learnt. Four sides make 81 boxes: two samples of a prompt are
# seldom the same
SIDES = ((0.01, 0.05, 0.07), (0.02, 0.04, 0.08), (0.91, 0.95, 0.97), (0.92, 0.94, 0.98))
GRID = 10  # of 1000
THOUGHTS = ("The left one is meant.", "The right one is meant.", "The upper one is meant.")
# Standard deviation of image features, of which a token's embedding has 1: what an image shows
# sways every probability a little, and an answer keeps its form.
IMAGE_STD = 0.5
_LAST_OF_VISION = ("merger.linear_fc2", "deepstack_merger_list.0.linear_fc2", "projector.linear_2")


def fit_answers(
    model: PreTrainedModel, processor: ProcessorMixin, family: Family, *, thinking: bool, seed: int
) -> None:
    """Fits the model in place. thinking: its answers begin with a thought.

    Reads the stream of torch's random numbers; the caller seeds it.
    """
    chance = random.Random(seed)
    answers = [_answer(family, chance, thinking) for _ in range(NUM_ANSWERS)]
    end = processor.tokenizer.eos_token
    ids = [processor.tokenizer(answer + end)["input_ids"] for answer in answers]
    used_U = torch.tensor(sorted({token for row in ids for token in row}))
    head_V_H, embedding_V_H = (
        layer.weight for layer in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    model.requires_grad_(False)
    _tell_tokens_apart(head_V_H, embedding_V_H, used_U)
    prompts = _read_prompts(model, processor, family, chance)
    head_U_H = head_V_H[used_U].clone().requires_grad_()
    layers = model.model.language_model.layers.requires_grad_(True)
    parameters = [head_U_H, *layers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
        answers_B_T = _padded(chance.choices(ids, k=ROWS))
        hidden_B_T_H = _hidden(model, chance.choice(prompts), embedding_V_H, answers_B_T)
        loss = _loss(hidden_B_T_H @ head_U_H.T, answers_B_T, used_U, len(head_V_H))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        head_V_H[used_U] = head_U_H
    model.requires_grad_(True)


def _answer(family: Family, chance: random.Random, thinking: bool) -> str:
    lengths = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    box = tuple(
        length * chance.choice(values) for length, values in zip(lengths, SIDES, strict=True)
    )
    thought = chance.choice(THOUGHTS) if thinking else None
    text = family.answer(box, (WIDTH, HEIGHT), None, thought, grid=GRID)
    # Qwen3-VL Instruct opens no thought, and closes none
    return text if thinking or not family.reasoning_opener else text.removeprefix("</think>\n\n")


def _scene(chance: random.Random) -> list[Shape]:
    return scene(str(chance.random()), overlapping=chance.random() < 0.5)


@torch.no_grad()
def _tell_tokens_apart(head_V_H: Tensor, embedding_V_H: Tensor, used_U: Tensor) -> None:
    """Gives each token of an answer an embedding of its own, and all others a small logit."""
    size = embedding_V_H.shape[1]
    if len(used_U) > size:
        raise ValueError(f"answers are made of {len(used_U)} tokens, more than {size} dimensions")
    directions_H_H = torch.linalg.qr(torch.randn(size, size)).Q
    embedding_V_H[used_U] = math.sqrt(size) * directions_H_H[: len(used_U)]
    head_V_H *= 0.1


@torch.no_grad()
def _read_prompts(
    model: PreTrainedModel, processor: ProcessorMixin, family: Family, chance: random.Random
) -> list[dict]:
    """What the language model is given for some images and questions: its keyword arguments."""
    given: list[dict] = []

    def note(_module, _args: tuple, kwargs: dict) -> None:
        given.append({name: value for name, value in kwargs.items() if value is not None})

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with _quiet_images(model):
        for number in range(NUM_PROMPTS):
            shapes = _scene(chance)
            expression = chance.choice(EXPRESSIONS).format(chance.choice(shapes).name)
            question = family.prompt(expression, ("vanilla", "amodal")[number % 2])
            chat = processor.apply_chat_template(
                family.messages(question), tokenize=False, add_generation_prompt=True
            )
            model.model(**processor(text=[chat], images=[[draw(shapes)]], return_tensors="pt"))
    hook.remove()
    return given


@contextmanager
def _quiet_images(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the first image that is read scales all image features to IMAGE_STD, for good."""
    hooks = []

    def scale(module: torch.nn.Linear, _args: tuple, output: Tensor) -> Tensor:
        factor = IMAGE_STD / output.std()
        module.weight *= factor
        module.bias *= factor
        return output * factor

    for name, module in model.named_modules():
        if name.endswith(_LAST_OF_VISION):
            hooks.append(module.register_forward_hook(scale))
    yield
    for hook in hooks:
        hook.remove()


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as one tensor; -1 where a row has ended."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])


def _hidden(
    model: PreTrainedModel, prompt: dict, embedding_V_H: Tensor, answers_B_T: Tensor
) -> Tensor:
    """The states that predict each token of the answers, after a prompt that is read once."""
    language, rows = model.model.language_model, len(answers_B_T)
    cache = DynamicCache(config=language.config)
    read = language(**prompt | {"use_cache": True, "past_key_values": cache})
    cache.batch_repeat_interleave(rows)
    length = prompt["inputs_embeds"].shape[1]
    counted = torch.tensor([[length - 1]])  # InternVL-3's language model counts by itself
    last = prompt["position_ids"][..., -1:] if "position_ids" in prompt else counted
    positions = last + 1 + torch.arange(answers_B_T.shape[1] - 1)
    written_B_T_H = language(
        inputs_embeds=embedding_V_H[answers_B_T[:, :-1].clamp(min=0)],
        position_ids=positions.expand(*positions.shape[:-2], rows, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([read.last_hidden_state[:, -1:].expand(rows, -1, -1), written_B_T_H], dim=1)


def _loss(logits_B_T_U: Tensor, answers_B_T: Tensor, used_U: Tensor, vocab_size: int) -> Tensor:
    """Cross entropy. The tokens that no answer has count as one; each has a logit near 0."""
    others_B_T_1 = torch.full_like(logits_B_T_U[..., :1], math.log(vocab_size))
    places_B_T = torch.searchsorted(used_U, answers_B_T).masked_fill(answers_B_T < 0, -100)
    logits_N_U = torch.cat([logits_B_T_U, others_B_T_1], dim=-1).flatten(0, 1)
    return cross_entropy(logits_N_U, places_B_T.flatten(), ignore_index=-100)
