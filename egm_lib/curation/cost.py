"""Tokens and dollars: what requests may cost before they are asked, and what they did cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

from egm_lib.curation.ledger import Ledger
from egm_lib.curation.marks import MAX_SIDE_PX
from egm_lib.curation.tasks import CurationTask
from egm_lib.profile import Price

BATCH_DISCOUNT = 0.5  # OpenAI's Batch API


@dataclass(frozen=True)
class CostEstimate:
    """What a task would ask and cost. basis: where the token counts come from."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    at_most_usd: float
    basis: str
    price: Price | None

    def of_share(self, share: float) -> CostEstimate:
        """The estimate if only a share of the requests is made; at most, all of them are."""
        return replace(
            self,
            requests=round(self.requests * share),
            prompt_tokens=round(self.prompt_tokens * share),
            completion_tokens=round(self.completion_tokens * share),
            cost_usd=self.cost_usd * share,
            basis=f"{self.basis}; {share:.0%} of the samples, at most all",
        )

    def __str__(self) -> str:
        tokens = (
            f"about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        )
        cost = (
            f"about {self.cost_usd:,.2f} USD, at most {self.at_most_usd:,.2f} USD"
            if self.price
            else "price unknown"
        )
        return f"{self.requests:,} requests, {tokens} ({self.basis}): {cost}"


def image_prompt_tokens(width: int, height: int) -> int:
    """Prompt tokens of an image by OpenAI's rule for gpt-4o and gpt-4.1.

    85, and 170 per tile of 512 px, after scaling the shorter side down to 768 px. Other services
    count otherwise; once there are answers, their usage is the estimate.
    """
    scale = min(1.0, MAX_SIDE_PX / max(width, height), 768 / min(width, height))
    return 85 + 170 * -(-int(width * scale) // 512) * -(-int(height * scale) // 512)


def prompt_tokens(task: CurationTask, sample: Mapping) -> int:
    """Estimate of a request's prompt: a token per four characters of English, and the image."""
    return len(task.prompt(sample)) // 4 + image_prompt_tokens(sample["width"], sample["height"])


def cost_usd(
    prompt: float, completion: float, price: Price | None, *, batch: bool = False
) -> float:
    """US dollars for so many prompt and completion tokens; 0 where no price is known."""
    if price is None:
        return 0.0
    discount = BATCH_DISCOUNT if batch else 1.0
    return discount * (prompt * price.prompt + completion * price.completion) / 1e6


class SpendingCap:
    """A cap on a ledger's cost. Each request under way sets aside the most that it may cost."""

    def __init__(self, limit_usd: float | None, ledger: Ledger) -> None:
        self.limit_usd = float("inf") if limit_usd is None else limit_usd
        self.ledger = ledger
        self.reserved_usd, self.under_way = 0.0, 0
        self._settled = asyncio.Condition()

    def take(self, usd: float) -> bool:
        """Set aside a request's cost if there is room for it."""
        if self.ledger.cost_usd + self.reserved_usd + usd > self.limit_usd:
            return False
        self.reserved_usd += usd
        self.under_way += 1
        return True

    async def take_patiently(self, usd: float, stop: threading.Event) -> bool:
        """Like `take`, but waits for requests under way, which may cost less than they set aside.

        False where there is no room although none is under way, or when `stop` is set.
        """
        async with self._settled:
            while not self.take(usd):
                if self.under_way == 0 or stop.is_set():
                    return False
                await self._settled.wait()
        return True

    async def give_back(self, usd: float) -> None:
        """A request has ended: what it cost stands in the ledger now."""
        async with self._settled:
            self.reserved_usd -= usd
            self.under_way -= 1
            self._settled.notify_all()

    @property
    def used_up(self) -> str:
        return (
            f"stopped at {self.ledger.cost_usd:.4f} USD: the next request might exceed the budget "
            f"of {self.limit_usd:g} USD; run again with a larger one to continue"
        )
