"""Checkpoints as they really come: an odd folder gets the sentence that fits, and runs no code."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from egm_lib.errors import InputError
from egm_lib.files import project_root
from egm_lib.inference.loading import load_config, load_model, load_processor
from egm_lib.inference.model_folder import (
    check_plain,
    check_weights,
    check_whole,
    find_checkpoint,
)
from egm_lib.inference.vllm_engine import VLLMEngine
from egm_lib.profile import load_profile
from egm_lib.training.checkpoints import require_checkpoint
from egm_lib.training.model_setup import load_start

MINI = project_root() / "data/mini/small"
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of a whole checkpoint, to be made odd."""
    return shutil.copytree(MINI, tmp_path / "model")


def edit(file, **changes):
    """Sets keys of a JSON file; None removes a key."""
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    values = {key: value for key, value in (values | changes).items() if value is not None}
    file.write_text(json.dumps(values), encoding="utf-8")


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def then(*steps):
    return lambda folder: [step(folder) for step in steps]


def cut(name, keep):
    def tear(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return tear


def shards(*there):
    """Weights in two shards, of which those named are on the disk."""

    def divide(folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = [
            f"model-0000{1 + number % 2}-of-00002.safetensors" for number in range(len(weights))
        ]
        for name in there:
            kept = {key for key, shard in zip(weights, names, strict=True) if shard == name}
            save_file({key: weights[key] for key in kept}, folder / name, {"format": "pt"})
        edit(folder / INDEX, weight_map=dict(zip(weights, names, strict=True)), metadata={})

    return divide


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
WITHOUT = remove("model.safetensors")

# What is done to a whole folder, and what the sentence must say: the thing, and how to mend it
ODD = {
    "InternVL as OpenGVLab first published it": (
        config(model_type="internvl_chat", auto_map={"AutoConfig": "evil.Config"}),
        "custom code .* never run here.* ends in -hf",
    ),
    "another model with custom code": (
        config(model_type="mystery", auto_map={"AutoModel": "evil.Model"}),
        "custom code .* never run here.* take a checkpoint of qwen3-vl",
    ),
    "a text model": (
        config(model_type="qwen3", vision_config=None),
        "text-only model .*vision-language",
    ),
    "another vision model: Qwen2.5-VL answers in other coordinates": (
        config(model_type="qwen2_5_vl"),
        "no prompt format here .*qwen2_5_vl",
    ),
    "InternVL where the profile says Qwen3-VL": (
        config(model_type="internvl"),
        "family internvl-3 .*says qwen3-vl: set its `family`",
    ),
    "no model_type at all": (config(model_type=None), "model_type None"),
    "Qwen3-VL without its eyes": (config(vision_config=None), "no vision_config"),
    "config.json is a list": (write("config.json", "[]"), "config.json holds a list.*copy it"),
    "config.json is torn": (cut("config.json", 0.5), "config.json is not JSON"),
    "config.json is a page that asks to log in": (
        write("config.json", "<!doctype html>"),
        "config.json is not JSON",
    ),
    "a value of config.json has the wrong kind": (
        config(text_config={"hidden_size": "wide"}),
        "config.json .*cannot be used",
    ),
    "quantised by AWQ": (
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        "quantised by awq.*checkpoint that it was made from.*vllm",
    ),
    "quantised by GPTQ": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised by gptq",
    ),
    "quantised to FP8": (
        config(quantization_config={"quant_method": "fp8"}),
        "quantised by fp8",
    ),
    "quantised by bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised by bitsandbytes",
    ),
    "quantised, and it does not say how": (
        config(quantization_config={"bits": 4}),
        "quantised by an unnamed method",
    ),
    "cloned without Git LFS": (
        write("model.safetensors", POINTER),
        r"pointers of Git LFS .*\(model.safetensors\).* `git lfs pull`",
    ),
    "only the tokenizer is a pointer": (write("tokenizer.json", POINTER), "git lfs pull"),
    "GGUF beside a config": (
        then(WITHOUT, write("model-q4.gguf", "GGUF")),
        "no weights",
    ),
    "GGUF alone": (
        then(remove("config.json"), WITHOUT, write("model-q4.gguf", "GGUF")),
        "GGUF weights, for llama.cpp",
    ),
    "pickles": (then(WITHOUT, write("pytorch_model.bin", "")), "pickles .*not read.*safetensors"),
    "no weights": (WITHOUT, "no weights .*download"),
    "a download that stopped": (cut("model.safetensors", 0.7), "model.safetensors is incomplete"),
    "a download that never began": (cut("model.safetensors", 0), "model.safetensors is incomplete"),
    "one of two shards": (shards(FIRST), f"lacks 1 of the 2 files .*{SECOND}.*download"),
    "shards without their index": (
        then(shards(FIRST, SECOND), remove(INDEX)),
        f"several files .*{FIRST}, {SECOND}.* without {INDEX}",
    ),
    "an index of another shape": (
        then(WITHOUT, write(INDEX, '{"weight_map": []}')),
        "lacks weight_map or metadata",
    ),
    "an index that is a list": (then(WITHOUT, write(INDEX, "[]")), "holds a list, not an object"),
    "weights of a smaller model": (
        lambda folder: edit(
            folder / "config.json",
            text_config=json.loads((MINI / "config.json").read_text())["text_config"]
            | {"num_hidden_layers": 5},
        ),
        "lacks .* of the weights .*different models",
    ),
    "weights of another width": (
        lambda folder: edit(
            folder / "config.json",
            text_config=json.loads((MINI / "config.json").read_text())["text_config"]
            | {"intermediate_size": 512},
        ),
        "another size.*different models",
    ),
    "no tokenizer": (remove("tokenizer.json"), "lacks tokenizer.json: copy"),
    "a tokenizer torn": (cut("tokenizer.json", 0.5), "tokenizer of .* cannot be read"),
    "a tokenizer of the wrong shape": (
        write("tokenizer.json", '{"model": 1}'),
        "tokenizer of .* cannot be read",
    ),
    "no image processor": (remove("processor_config.json"), "lacks preprocessor_config.json"),
    "no chat template": (remove("chat_template.jinja"), "no chat template"),
    "the folder above, as the hub's cache has it": (
        lambda folder: [
            (folder / "snapshots/abc").mkdir(parents=True),
            (folder / "config.json").rename(folder / "snapshots/abc/config.json"),
        ],
        "folder below: give .*snapshots/abc",
    ),
    "a cache whose files were cleared": (
        then(WITHOUT, lambda folder: (folder / "model.safetensors").symlink_to("../blobs/gone")),
        r"links to missing files \(model.safetensors\)",
    ),
    "a training's divided state": (
        lambda folder: [
            (folder / "config.json").unlink(),
            (folder / "global_step20").mkdir(),
        ],
        "divided state of a training .*zero_to_fp32",
    ),
    "a whole model and an adapter": (
        write("adapter_config.json", '{"peft_type": "LORA"}'),
        "both a whole model .* and a LoRA adapter",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_gets_the_sentence_that_fits(folder, name):
    make_odd, sentence = ODD[name]
    make_odd(folder)
    # A module that would leave a trace if it were imported
    trace = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(InputError, match=sentence) as caught:
        load_model(folder, family="qwen3-vl")
        load_processor(folder, "qwen3-vl")
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message.split("(")[0]
    assert not trace.exists()


def test_the_whole_folder_is_loaded(folder):
    """The table above tests what was changed, not the copy."""
    model, processor = load_model(folder, family="qwen3-vl"), load_processor(folder, "qwen3-vl")
    assert model.config.model_type == load_config(folder).model_type == "qwen3_vl"
    assert processor.tokenizer.chat_template or processor.chat_template
    shards(FIRST, SECOND)(folder)
    divided = load_model(folder)
    pairs = zip(model.parameters(), divided.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_code_beside_a_known_kind_is_left_alone(folder, monkeypatch):
    """The hub's Qwen3-VL copies may name code too; ours is used, and nobody is asked."""
    trace = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf-8")
    code = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    edit(folder / "config.json", auto_map=code)
    code = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="EvilTokenizer")
    edit(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.Processor"})
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    load_model(folder, family="qwen3-vl")
    load_processor(folder, "qwen3-vl")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("model.safetensors", "is a file: give the folder"),
        ("model-q4.gguf", "is a GGUF file, for llama.cpp"),
        ("~/models/qwen", "write the path in full"),
    ],
)
def test_a_path_that_is_no_folder(tmp_path, path, sentence):
    if not path.startswith("~"):
        (tmp_path / path).write_bytes(b"GGUF")
        path = tmp_path / path
    with pytest.raises(InputError, match=sentence):
        load_model(path)


def test_a_hub_id_is_told_of_its_own_hf_repository(monkeypatch):
    stated = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "c.Config"}}
    monkeypatch.setattr(
        "egm_lib.inference.model_folder.PretrainedConfig.get_config_dict",
        lambda *args, **options: (stated, {}),
    )
    with pytest.raises(InputError, match="OpenGVLab/InternVL3-2B-hf"):
        load_model("OpenGVLab/InternVL3-2B")


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter on the miniature's small base, and the answer of base and adapter unmerged."""
    torch.manual_seed(0)
    base = load_model(MINI)
    options = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    model = get_peft_model(base, options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first, which would change nothing
            torch.nn.init.normal_(parameter, std=0.1)
    place = tmp_path / "adapter"
    model.save_pretrained(place)
    edit(place / "adapter_config.json", base_model_name_or_path="data/mini/small")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(7, 17)[None]).logits
    return SimpleNamespace(folder=place, logits=logits)


def test_a_lora_adapter_is_loaded_on_its_base(adapter):
    """Merged weights must answer as base and adapter do side by side."""
    model = load_model(adapter.folder, family="qwen3-vl")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(7, 17)[None]).logits
        plain = load_model(MINI)(input_ids=torch.arange(7, 17)[None]).logits
    assert torch.allclose(logits, adapter.logits, atol=1e-4)
    assert not torch.allclose(logits, plain, atol=1e-2)
    assert not hasattr(model, "peft_config") and not any("lora" in n for n in model.state_dict())
    assert load_processor(adapter.folder, "qwen3-vl").tokenizer.eos_token
    assert load_config(adapter.folder).model_type == "qwen3_vl"


ADAPTERS = {
    "its base was in another machine's folder": (
        {"base_model_name_or_path": "/gone/qwen"},
        "on /gone/qwen, which is missing: set base_model_name_or_path",
    ),
    "its base was a relative folder": (
        {"base_model_name_or_path": "checkpoints/a/b"},
        "on checkpoints/a/b, which is missing",
    ),
    "it names no base": ({"base_model_name_or_path": None}, "names no base model"),
    "it is no LoRA": ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING': only LORA"),
    "it was trained on another model": (
        {"base_model_name_or_path": "data/mini/large"},
        "does not fit its base",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_odd_adapter_gets_the_sentence_that_fits(adapter, name):
    changes, sentence = ADAPTERS[name]
    edit(adapter.folder / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=sentence):
        load_model(adapter.folder)


def test_an_adapter_s_weights_are_checked_too(adapter):
    (adapter.folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="adapter_model.safetensors is incomplete"):
        load_model(adapter.folder)
    (adapter.folder / "adapter_model.safetensors").rename(adapter.folder / "adapter_model.bin")
    with pytest.raises(InputError, match="holds no adapter_model.safetensors"):
        load_model(adapter.folder)


def test_an_adapter_on_an_adapter(adapter, tmp_path):
    upper = shutil.copytree(adapter.folder, tmp_path / "upper")
    edit(upper / "adapter_config.json", base_model_name_or_path=str(adapter.folder))
    with pytest.raises(InputError, match="is a LoRA adapter itself: merge that"):
        load_model(upper)


def test_vllm_and_grpo_are_not_given_an_adapter(adapter):
    """Both read the folder themselves, and would answer with the base alone or stop."""
    with pytest.raises(InputError, match="vLLM needs a whole model: merge it into"):
        VLLMEngine(str(adapter.folder), "qwen3-vl")
    run = SimpleNamespace(checkpoint=lambda task, model: adapter.folder)
    with pytest.raises(InputError, match="starts from it needs a whole model: merge it into"):
        require_checkpoint(run, "vanilla", "small-sft", "SFT")


def test_vllm_may_have_quantised_weights_but_not_torn_ones(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    found = find_checkpoint(folder, family="qwen3-vl")
    check_weights(found)
    check_whole(found, "vLLM")
    with pytest.raises(InputError, match="quantised by awq"):
        check_plain(found)
    cut("model.safetensors", 0.5)(folder)
    with pytest.raises(InputError, match="is incomplete"):
        VLLMEngine(str(folder), "qwen3-vl")


def test_a_training_gets_the_same_sentences(folder):
    """SFT from the profile's path, GRPO from SFT's folder: both begin with load_start."""
    start = replace(load_profile("mini").models.small, path=str(folder))
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="quantised by gptq.*SFT and GRPO"):
        load_start(str(folder), start, "float32")
