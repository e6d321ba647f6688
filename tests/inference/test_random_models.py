"""Models with random weights: they have the shape that was asked for, and answer."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch

from egm_lib.files import project_root, read_json
from egm_lib.inference.decode_loop import SamplingOptions, complete, read_inputs
from egm_lib.inference.random_models import config_of, cut, random_inputs, random_model
from egm_lib.model_shapes import SHAPES, shape_from_config


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_is_read_back_as_its_shape(name):
    shape = shape_from_config(config_of(SHAPES[name]))
    assert (shape.text, shape.vision) == (SHAPES[name].text, SHAPES[name].vision)


@pytest.mark.parametrize("name", ["Qwen3-VL-2B", "InternVL3-1B", "Qwen3-VL-235B-A22B"])
def test_a_small_one_reads_an_image_and_writes_tokens(name):
    shape = SHAPES[name]
    experts = {"experts": 4, "active_experts": 2} if shape.text.experts else {}
    text = replace(shape.text, layers=3, hidden=64, heads=4, kv_heads=2, intermediate=64, **experts)
    if not text.qk_norm:  # Qwen2.5's heads divide its width
        text = replace(text, head_dim=16)
    tower = {"depth": 4, "hidden": 64, "heads": 4, "intermediate": 64, "out_hidden": 64}
    vision = replace(shape.vision, **tower)
    shape = replace(shape, text=text, vision=vision)
    model = random_model(shape, torch.float32, "cpu")
    assert model.num_parameters() == shape.parameters
    inputs = random_inputs(model, shape, (448, 448), 5, requests=2)
    image_tokens = shape.vision.image_tokens(448, 448)
    assert inputs["input_ids"].shape == (2, image_tokens + 5)
    options = SamplingOptions(3, temperature=0.0)
    found = complete(model, read_inputs(model, inputs), 1, options, [])
    assert [len(tokens) for tokens in found.tokens] == [3, 3]
    assert torch.isfinite(torch.tensor(found.logps)).all()


def test_every_weight_is_written():
    """Memory that was never written is not really read, and costs nothing."""
    shape = cut(SHAPES["Qwen3-VL-2B"], 14)
    shape = replace(shape, text=replace(shape.text, vocabulary=151_936, hidden=64))
    shape = replace(shape, vision=replace(shape.vision, out_hidden=64))
    model = random_model(shape, torch.bfloat16, "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.count_nonzero() > 0, name


def test_a_cut_model_keeps_its_width_and_says_so():
    shape = SHAPES["Qwen3-VL-8B"]
    quarter = cut(shape, 4)
    assert (quarter.text.layers, quarter.vision.depth) == (9, 6)
    assert quarter.text.layer() == shape.text.layer()
    assert cut(shape, 1) is shape


def test_the_bench_keeps_what_it_measured_on_this_machine(bench, tmp_path, monkeypatch):
    """Measurements take long: one that was cut off goes on, and another machine starts anew."""
    asked = []

    def in_process(*options):
        if options[0] == "--probe":
            return {"float32": {}, "bfloat16": {}}
        asked.append(json.loads(options[1])["model"])
        if asked == ["Qwen3-VL-2B", "Qwen3-VL-4B"]:
            raise KeyboardInterrupt
        return {"vision_ms": 1.0, "first_token_ms": 2.0, "token_ms": 3.0, "total_ms": {"42": 9.0}}

    cases = tuple(bench.Case(f"Qwen3-VL-{size}") for size in ("2B", "4B", "8B"))
    monkeypatch.setattr(bench, "in_process", in_process)
    monkeypatch.setattr(bench, "CPU_CASES", cases)
    monkeypatch.setattr(bench, "GPU_CASES", cases)
    monkeypatch.setattr(bench, "why_not", lambda case, device: "large" * ("8B" in case.model))
    with pytest.raises(KeyboardInterrupt):
        bench.run(None, tmp_path, again=False)
    bench.run(None, tmp_path, again=False)
    assert asked == ["Qwen3-VL-2B", "Qwen3-VL-4B", "Qwen3-VL-4B"]
    rows = read_json(next(tmp_path.glob("*.json")))["rows"]
    assert [row["model"] for row in rows] == [case.model for case in cases]
    assert rows[2]["not_run"] == "large"
    bench.run(["Qwen3-VL-2B"], tmp_path, again=True)
    assert asked[3:] == ["Qwen3-VL-2B"]
    monkeypatch.setattr(bench, "machine", lambda device: {"name": "another"})
    bench.run(None, tmp_path, again=False)
    assert asked[4:] == ["Qwen3-VL-2B", "Qwen3-VL-4B"]


@pytest.fixture
def bench():
    """The script benchmarks/bench_latency_scale.py as a module."""
    path = project_root() / "benchmarks" / "bench_latency_scale.py"
    spec = importlib.util.spec_from_file_location("bench_latency_scale", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
