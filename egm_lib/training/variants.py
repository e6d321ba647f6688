"""The variants that `egm_lib.pipeline.ablations` trains and decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TASK = "vanilla"
STEPS = 40  # ours: enough for the miniature's curves to separate
# Ours; majority-1: one sample
DECODINGS = ("budget-8", "budget-16", "budget-24", "majority-1", "majority-8")


@dataclass(frozen=True)
class Variant:
    """One training of the ablations.

    start: the model that is trained, small-base or small-sft.
    changes: options of the profile's `grpo` that differ; None: no GRPO.
    """

    start: str
    changes: Mapping[str, float] | None = field(default_factory=dict)


VARIANTS = {
    "base": Variant("small-base", None),
    "sft": Variant("small-sft", None),
    "grpo": Variant("small-base"),
    "sft-and-grpo": Variant("small-sft"),  # as in the paper: reward weight 0.5, with KL
    **{
        f"reward-weight-{weight:g}": Variant("small-sft", {"reward_weight": weight})
        for weight in (0, 0.25, 0.75, 1)
    },
    "without-kl": Variant("small-sft", {"beta": 0.0}),
}
