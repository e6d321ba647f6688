"""The devices that a training is planned for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from egm_lib.devices import DATA_SHEETS, DataSheet
from egm_lib.errors import EgmError

GIB = 2**30


class PlanError(EgmError, ValueError):
    """What cannot be planned, and why."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or the CPU of this machine.

    memory_gib: all of it. bf16_tflops, float32_tflops: dense peak of matrix products.
    bandwidth_tb_s: of its memory.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    bandwidth_tb_s: float

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU"


def _gpu(sheet: DataSheet, name: str) -> Device:
    """A card of which the data sheet states float32 too."""
    return Device(
        name=name,
        memory_gib=sheet.memory_gb,  # printed as GB, and nearly as many GiB
        bf16_tflops=sheet.tflops,
        float32_tflops=sheet.tflops_float32,
        bandwidth_tb_s=sheet.bandwidth_gbs / 1000,
    )


DEVICES = {
    "a100-40": _gpu(DATA_SHEETS["A100-40"], "A100 40 GB"),
    "a100": _gpu(DATA_SHEETS["A100"], "A100 80 GB"),
    "h100": _gpu(DATA_SHEETS["H100"], "H100 80 GB"),
    "h200": _gpu(DATA_SHEETS["H200"], "H200 141 GB"),
    # Ours: two cores with AVX-512
    "cpu": Device(
        name="CPU", memory_gib=0, bf16_tflops=0.1, float32_tflops=0.1, bandwidth_tb_s=0.02
    ),
}
DeviceName = Literal["a100-40", "a100", "h100", "h200", "cpu"]


@dataclass(frozen=True)
class Hardware:
    """So many of one device."""

    device: Device
    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise PlanError(f"A plan needs at least one device, but --gpus is {self.count}.")

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


def hardware(name: DeviceName, count: int = 1, memory_gib: float | None = None) -> Hardware:
    """Hardware by the name of its device.

    memory_gib: other than the card's; the CPU's is that of this machine.
    Raises PlanError for several CPUs, or none of a device.
    """
    device = DEVICES[name]
    if not device.is_gpu and count > 1:
        raise PlanError(f"On a CPU, a training is one process: set --gpus to 1, not to {count}.")
    if memory_gib is None and not device.is_gpu:
        memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Hardware(device if memory_gib is None else replace(device, memory_gib=memory_gib), count)
