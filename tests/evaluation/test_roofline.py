"""The roofline against sums made by hand, and against measurements of others."""

from dataclasses import replace

import pytest

from egm_lib.evaluation.roofline import (
    DEVICES,
    Device,
    Request,
    RooflineError,
    Serving,
    decode_ms,
    device_of,
    fits,
    predict,
    prefill_ms,
    same_experts,
    touched_experts,
    vision_ms,
)
from egm_lib.evaluation.roofline_check import (
    Point,
    errors,
    fit,
    held_out,
    measured_points,
    public_points,
)
from egm_lib.model_shapes import SHAPES

L20, A100 = DEVICES["L20"], DEVICES["A100"]
EIGHT_B, MOE = SHAPES["Qwen3-VL-8B"], SHAPES["Qwen3-VL-235B-A22B"]
REQUEST = Request(answer_tokens=101)
# One Gflop/s and one GB/s: times are operations and bytes, counted
UNIT = Device(
    name="unit",
    memory_gb=100,
    bandwidth_gbs=1,
    tflops=1e9,
    link_gbs=1,
    bandwidth_share=1,
    compute_share=1,
    layer_us=0,
    reduce_us=0,
    source="made up",
)


def test_a_token_waits_for_the_weights_of_the_language_model():
    """By hand: 7.57 billion parameters without the embedding, two bytes each, at 864 GB/s."""
    weights = EIGHT_B.text.parameters - EIGHT_B.text.embedding
    cache = 400 * 2 * 36 * 8 * 128 * 2  # tokens x keys and values x layers x heads x width x bytes
    expected = (2 * weights + cache) / 864e9 * 1000
    assert decode_ms(EIGHT_B, 400, Serving(device=L20.bound())) == pytest.approx(expected, rel=1e-4)
    assert 17 < expected < 18


def test_101_tokens_of_the_8b_model_take_more_than_the_published_737_ms_on_one_l20():
    bound = predict(EIGHT_B, REQUEST, Serving(device=L20.bound()))
    assert bound.total_ms > 1700
    assert bound.total_ms == pytest.approx(
        bound.vision_ms + bound.prefill_ms + 100 * bound.token_ms
    )


def test_prefill_is_two_operations_a_parameter_and_token():
    """On a device that reads at once; the attention among 300 tokens adds about a hundredth."""
    device = replace(UNIT, bandwidth_gbs=1e9, tflops=1)
    layers = EIGHT_B.text.layers * EIGHT_B.text.layer()
    expected = 2 * layers * 300 / 1e12 * 1000
    ratio = prefill_ms(EIGHT_B, 300, Serving(device=device)) / expected
    assert 1 < ratio < 1.02


def test_a_tile_sees_only_itself_and_qwen_s_image_is_seen_whole():
    """Twice the tiles take twice as long; twice the patches of one image take more."""
    device = Serving(device=replace(UNIT, bandwidth_gbs=1e9, tflops=1))
    intern, qwen = SHAPES["InternVL3-8B"], EIGHT_B
    assert vision_ms(intern, 512, device) == pytest.approx(2 * vision_ms(intern, 256, device))
    assert vision_ms(qwen, 4000, device) > 2.1 * vision_ms(qwen, 2000, device)


def test_experts_that_tokens_touch():
    """One token needs 8 of 128; two need 8 + 8 (1 - 8/128) if drawn at random; many need all."""
    assert touched_experts(MOE.text, 1) == pytest.approx(8)
    assert touched_experts(MOE.text, 2) == pytest.approx(8 + 8 * (1 - 8 / 128))
    assert touched_experts(MOE.text, 10_000) == pytest.approx(128)
    assert touched_experts(EIGHT_B.text, 5) == 0
    serving = Serving(device=UNIT)
    alone = decode_ms(MOE, 1, serving)
    assert alone == pytest.approx(2 * MOE.text.active_parameters / 1e9 * 1000, rel=1e-3)
    assert same_experts(EIGHT_B) is EIGHT_B
    many = Serving(device=UNIT, concurrency=64)
    assert decode_ms(same_experts(MOE), 1, many) < 1.01 * alone < decode_ms(MOE, 1, many) / 8


def test_requests_share_the_reading_of_weights_but_not_their_cache():
    one, eight = (decode_ms(EIGHT_B, 400, Serving(device=UNIT, concurrency=n)) for n in (1, 8))
    cache_ms = 400 * EIGHT_B.text.kv_bytes() / 1e9 * 1000
    assert eight - one == pytest.approx(7 * cache_ms)


def test_devices_divide_the_work_and_add_all_reduces():
    bound = [
        decode_ms(EIGHT_B, 400, Serving(device=L20.bound(), tensor_parallel=n)) for n in (1, 8)
    ]
    assert bound[0] / bound[1] == pytest.approx(8)
    real = decode_ms(EIGHT_B, 400, Serving(device=L20, tensor_parallel=8))
    reduces_ms = 2 * 36 * L20.reduce_us / 1000
    assert real > bound[0] / 8 / L20.bandwidth_share + reduces_ms


def test_more_devices_than_kv_heads_keep_copies():
    """InternVL3-2B has two heads of keys: on four devices each is stored twice."""
    small = SHAPES["InternVL3-2B"]
    long = 10**6
    two, four = (
        decode_ms(small, long, Serving(device=UNIT.bound(), tensor_parallel=n)) for n in (2, 4)
    )
    assert two / four < 1.1


@pytest.mark.parametrize(
    ("model", "precision", "devices", "expected"),
    [
        ("Qwen3-VL-8B", "bf16", 1, True),  # 17.5 GB of 48
        ("Qwen3-VL-32B", "bf16", 1, False),  # 66.7 GB
        ("Qwen3-VL-32B", "fp8", 1, True),
        ("Qwen3-VL-235B-A22B", "bf16", 8, False),  # 472 GB of 384
        ("Qwen3-VL-235B-A22B", "fp8", 8, True),
        ("InternVL3-1B", "bf16", 4, False),  # 14 heads are not divisible by 4
    ],
)
def test_what_fits_on_l20(model, precision, devices, expected):
    serving = Serving(device=L20, precision=precision, tensor_parallel=devices)
    assert fits(SHAPES[model], REQUEST, serving) is expected


def test_bad_input_gets_a_sentence():
    with pytest.raises(RooflineError, match="L20"):
        device_of("L21")
    assert device_of("jetson-thor") is DEVICES["Jetson-Thor"]
    with pytest.raises(RooflineError, match="no link"):
        Serving(device=DEVICES["Jetson-Thor"], tensor_parallel=2)
    with pytest.raises(RooflineError, match="at least 1"):
        Request(answer_tokens=0)
    with pytest.raises(RooflineError, match="one request"):
        Serving(device=L20, concurrency=0)


def test_short_formats_use_what_the_device_has():
    thor, a100 = DEVICES["Jetson-Thor"].bound(), A100.bound()
    assert thor.peak_flops("nvfp4") == 4 * thor.peak_flops("bf16") * 1035 / 1034
    assert a100.peak_flops("nvfp4") == a100.peak_flops("fp8") == a100.peak_flops("bf16")


# Public measurements: what docs/efficiency.md states of them


def test_decoding_agrees_with_the_public_measurements():
    """Fitted to 16 bits: within 15 %, and within 21 % for a source that was left out of the fit."""
    fitted = [point for point in public_points() if point.fitted]
    assert fit(fitted) == (L20.bandwidth_share, L20.layer_us, L20.reduce_us)
    assert errors(fitted).median < 0.03 and abs(errors(fitted).worst) < 0.16
    left_out = errors(held_out(fitted))
    assert left_out.median < 0.07 and abs(left_out.worst) < 0.21


def test_decoding_of_models_that_were_not_fitted():
    """Qwen3-VL itself in four bits on a Jetson Thor, one and eight at a time."""
    unseen = [p for p in public_points() if p.phase == "decode" and not p.fitted]
    dense = [point for point in unseen if not point.shape.text.experts]
    assert len(dense) == 6 and abs(errors(dense).worst) < 0.07
    assert errors(unseen).worst_label.startswith("Qwen3-30B-A3B")


def test_a_measurement_that_the_data_sheet_rules_out_is_not_counted():
    [cached] = [point for point in public_points() if point.faster_than_peak]
    assert cached.phase == "prefill" and cached.tokens == 2048
    assert errors([cached]) is None


def test_own_measurements_are_predicted_from_their_probe():
    """A model that takes exactly what the probe says, and 10 us a layer more."""
    shape = SHAPES["Qwen3-VL-2B"]
    probe = {"float32": {"gbs": 10.0, "gflops": {"1": 5.0, "8": 10.0, "320": 80.0}}}
    record = {
        "machine": {"name": "a CPU", "device": "cpu"},
        "image_wh": [640, 480],
        "prompt_tokens": 30,
        "probes": [probe, probe],
        "rows": [{"model": "Qwen3-VL-4B", "not_run": "no room"}],
    }
    device = replace(UNIT, bandwidth_gbs=10, tflops=0.005, layer_us=10)
    token_ms = decode_ms(shape, 330 + 50, Serving(device=device, precision="float32"))
    row = {"model": "Qwen3-VL-2B", "dtype": "float32", "requests": 1, "share": 1, "layers": 28}
    row |= {"depth": 24, "answers": [100], "vision_ms": 1e4, "prefill_ms": 1e4}
    record["rows"].append(row | {"token_ms": token_ms})
    vision, prefill, decode = measured_points(record)
    assert decode.error == pytest.approx(0, abs=1e-6)
    assert decode.serving.device.layer_us == pytest.approx(10, rel=1e-3)
    assert prefill.serving.device.tflops == vision.serving.device.tflops == 0.08


def test_own_measurements_on_a_gpu_are_predicted_from_its_data_sheet():
    """A model that waits 1 ms a layer for Python, and else reads at 80 % of an H200's bandwidth."""
    shape, slow = SHAPES["Qwen3-VL-2B"], replace(DEVICES["H200"], layer_us=1000)
    rows = []
    for requests in (1, 8):
        serving = Serving(device=slow, precision="bf16", concurrency=requests)
        row = {"model": "Qwen3-VL-2B", "dtype": "bfloat16", "requests": requests, "share": 1}
        row |= {"layers": 28, "depth": 24, "answers": [100], "vision_ms": 24.0, "prefill_ms": 28.0}
        rows.append(row | {"token_ms": decode_ms(shape, 330 + 50, serving)})
    machine = {"name": "NVIDIA H200", "device": "cuda"}
    record = {"machine": machine, "image_wh": [640, 480], "prompt_tokens": 30, "rows": rows}
    points = measured_points(record | {"probes": []})
    decoding = [point.error for point in points if point.phase == "decode"]
    assert decoding == pytest.approx([0, 0], abs=1e-6)


def test_errors_keep_the_sign_of_the_worst():
    serving = Serving(device=UNIT)
    exact = decode_ms(EIGHT_B, 1, serving)
    points = [
        Point("s", name, EIGHT_B, serving, "decode", 1, factor * exact)
        for name, factor in (("slow", 2.0), ("as said", 1.0), ("slower", 4.0))
    ]
    found = errors(points)
    assert (found.count, found.median, found.worst_label) == (3, 0.5, "slower")
    assert found.worst == pytest.approx(-0.75)
