"""The table of devices: its numbers agree with each other, and its two readers with the table."""

import pytest

from egm_lib.devices import DATA_SHEETS
from egm_lib.evaluation import roofline
from egm_lib.training import hardware


@pytest.mark.parametrize("sheet", DATA_SHEETS.values(), ids=DATA_SHEETS)
def test_half_the_bits_are_twice_the_operations(sheet):
    """So it is on every device with tensor cores: a wrong factor for sparsity shows here."""
    if sheet.tflops_fp8:
        assert sheet.tflops_fp8 / sheet.tflops == pytest.approx(2, rel=0.005)
    if sheet.tflops_fp4:
        assert sheet.tflops_fp4 / sheet.tflops_fp8 == pytest.approx(2, rel=0.005)
    if sheet.tflops_float32:
        assert sheet.tflops_float32 < sheet.tflops / 10


def test_a_plan_and_the_roofline_compute_with_the_same_card():
    for name in ("a100-40", "a100", "h100", "h200"):
        planned, predicted = hardware.hardware(name).device, roofline.device_of(name)
        assert planned.memory_gib == predicted.memory_gb
        assert planned.bf16_tflops * 1e12 == predicted.bound().peak_flops("bf16")
        assert planned.bandwidth_tb_s * 1e12 == pytest.approx(predicted.bound().bytes_per_s())
