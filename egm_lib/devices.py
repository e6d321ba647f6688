"""What data sheets say of GPUs: numbers only, for the plan of a training and for the roofline.

Units: GB/s are powers of ten. GB of memory are copied as they are printed: a card holds nearly as
many GiB, which are more. tflops are 1e12 operations a second, a multiplication and an addition
counted as two, dense (without structured sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """One device as its data sheet states it.

    tflops: peak of 16-bit matrix products; tflops_fp8, tflops_fp4: of shorter ones, None where the
    device has none. tflops_float32: without tensor cores, as PyTorch computes it; None where no
    plan needs it. link_gbs: to another device, one way; 0 where there is no link.
    source: of all its numbers.
    """

    name: str
    memory_gb: float
    bandwidth_gbs: float
    tflops: float
    tflops_float32: float | None = None
    tflops_fp8: float | None = None
    tflops_fp4: float | None = None
    link_gbs: float = 0.0
    source: str


def _by_name(*sheets: DataSheet) -> dict[str, DataSheet]:
    return {sheet.name: sheet for sheet in sheets}


DATA_SHEETS = _by_name(
    DataSheet(
        name="L4",
        memory_gb=24,
        bandwidth_gbs=300,
        tflops=121,
        tflops_fp8=242.5,
        link_gbs=32,
        source="NVIDIA L4 data sheet (halved where it counts sparsity); PCIe 4.0 x16",
    ),
    DataSheet(
        name="L20",
        memory_gb=48,
        bandwidth_gbs=864,
        tflops=119.5,
        tflops_fp8=239,
        link_gbs=32,
        source="NVIDIA L20 data sheet; PCIe 4.0 x16",
    ),
    DataSheet(
        name="RTX-4090",
        memory_gb=24,
        bandwidth_gbs=1008,
        tflops=165.2,
        tflops_fp8=330.3,
        link_gbs=32,
        source="NVIDIA Ada GPU architecture whitepaper, float32 accumulation; PCIe 4.0 x16",
    ),
    DataSheet(
        name="A100-40",
        memory_gb=40,
        bandwidth_gbs=1555,
        tflops=312,
        tflops_float32=19.5,
        link_gbs=300,
        source="NVIDIA A100 40GB SXM data sheet; NVLink 3",
    ),
    DataSheet(
        name="A100",
        memory_gb=80,
        bandwidth_gbs=2039,
        tflops=312,
        tflops_float32=19.5,
        link_gbs=300,
        source="NVIDIA A100 80GB SXM data sheet; NVLink 3",
    ),
    DataSheet(
        name="H100",
        memory_gb=80,
        bandwidth_gbs=3350,
        tflops=989,
        tflops_float32=67,
        tflops_fp8=1979,
        link_gbs=450,
        source="NVIDIA H100 SXM data sheet (halved where it counts sparsity); NVLink 4",
    ),
    DataSheet(
        name="H200",
        memory_gb=141,
        bandwidth_gbs=4800,
        tflops=989,
        tflops_float32=67,
        tflops_fp8=1979,
        link_gbs=450,
        source="NVIDIA H200 SXM data sheet (halved where it counts sparsity); NVLink 4",
    ),
    DataSheet(
        name="B200",
        memory_gb=180,
        bandwidth_gbs=7700,
        tflops=2250,
        tflops_fp8=4500,
        tflops_fp4=9000,
        link_gbs=900,
        source="NVIDIA HGX B200 data sheet (halved: it counts sparsity); NVLink 5",
    ),
    DataSheet(
        name="Jetson-Thor",
        memory_gb=128,
        bandwidth_gbs=273,
        tflops=258.5,
        tflops_fp8=517,
        tflops_fp4=1035,
        source="NVIDIA Jetson T5000 data sheet: 2,070 sparse FP4 Tflop/s; an eighth of it for "
        "dense 16 bits",
    ),
    DataSheet(
        name="Jetson-Orin",
        memory_gb=64,
        bandwidth_gbs=204.8,
        tflops=42.5,
        source="NVIDIA Jetson AGX Orin 64GB data sheet: 170 sparse INT8 TOPS of the GPU; a quarter "
        "of it for dense 16 bits",
    ),
)
