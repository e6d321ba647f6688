"""What a run asks, and how its replies get into the ledger: the same for single requests and for
batches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from egm_lib.curation.cost import cost_usd, prompt_tokens
from egm_lib.curation.ledger import Ledger
from egm_lib.curation.services import read_completion, sampling_options
from egm_lib.curation.tasks import Task, messages, request_key
from egm_lib.data import resolve_image
from egm_lib.profile import Teacher

MAX_LISTED = 20  # failures that a report shows; the output file has all


class Request(NamedTuple):
    """One sample to ask about. prompt_tokens: an estimate; sample and image: None once a batch has
    been sent.
    """

    key: str
    sample_id: str
    prompt_tokens: int
    sample: Mapping | None = None
    image: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A task, the samples to ask about, and whom. root: what the samples' `image` is relative
    to.
    """

    task: Task
    samples: Iterable[Mapping]
    teacher: Teacher
    root: Path

    @cached_property
    def sampling(self) -> dict:
        ways = self.teacher.ways
        options = sampling_options(
            self.teacher.model, self.teacher.temperature, self.teacher.max_tokens
        )
        return options | ({"ways": asdict(ways)} if ways else {})

    def request(self, sample: Mapping) -> Request:
        """The request of a sample; raises OSError or ValueError where its picture cannot be
        found.
        """
        image = resolve_image(sample, self.root)
        key = request_key(self.task, sample, image, self.teacher.model, self.sampling)
        return Request(key, sample["sample_id"], prompt_tokens(self.task, sample), sample, image)

    def keyless(self, sample: Mapping) -> Request:
        """A request for estimates only: does not look at the picture."""
        return Request("", sample["sample_id"], prompt_tokens(self.task, sample))

    def body(self, request: Request) -> dict:
        """The chat request; reads and marks the picture, so raises OSError or ValueError."""
        content = messages(self.task, request.sample, request.image)
        return {"model": self.teacher.model, "messages": content, **self.sampling}

    def pending(self, ledger: Ledger, under_way: set[str]) -> Iterator[Request | None]:
        """A request for every sample without an answer; None for every sample that is not asked.

        under_way: a key is added when its request is given out, and is not given out again while it
        is there.
        """
        for sample in self.samples:
            try:
                request = self.request(sample)
            except (OSError, ValueError):
                yield None  # listed with its reason when the output is written
                continue
            if request.key in under_way or ledger.answer(request.key):
                yield None
                continue
            under_way.add(request.key)
            yield request

    def at_most_usd(self, request: Request, *, batch: bool = False) -> float:
        """What a request costs when its answer is as long as allowed."""
        return cost_usd(
            request.prompt_tokens, self.teacher.max_tokens, self.teacher.price_per_mtok, batch=batch
        )


@dataclass
class Report:
    """What a run did: its samples by fate, and what was asked and paid in this run.

    dropped: by filter; waiting: not asked yet; stopped: why the run ended early; failures: the
    first MAX_LISTED.
    """

    task: str
    model: str
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    failed: int = 0
    waiting: int = 0
    asked: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    wall_s: float = 0.0
    stopped: str | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        total = self.kept + self.dropped.total() + self.failed + self.waiting
        lines = [
            f"{self.task} by {self.model}: {total} samples; now {self.asked} asked, {self.prompt_tokens:,} + "
            f"{self.completion_tokens:,} tokens, {self.cost_usd:.4f} USD, {self.wall_s:.1f} s"
        ]
        rows = [
            ("kept", self.kept),
            *((f"dropped: {name}", count) for name, count in self.dropped.most_common()),
        ]
        rows += [("failed", self.failed), ("not asked yet", self.waiting)]
        lines += [f"  {name:<32} {count:>8}" for name, count in rows if count or name == "kept"]
        if self.unreadable:
            lines.append(
                f"  {self.unreadable} replies could not be read; the budget counts them as charged in full"
            )
        lines += [f"  failed: {sample_id}: {error}" for sample_id, error in self.failures]
        if self.failed > len(self.failures):
            lines.append(f"  ... and {self.failed - len(self.failures)} more, in the output file")
        return "\n".join([*lines, *([self.stopped] if self.stopped else [])])


@dataclass
class Receipts:
    """Puts replies into the ledger and counts them. secret: the service's key, which no record may
    hold.
    """

    plan: Plan
    ledger: Ledger
    report: Report
    secret: str
    batch: bool = False

    def receive(self, request: Request, body: str, **extra: object) -> bool:
        """Record a reply; False for one that is no chat completion."""
        usage = {
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": self.plan.teacher.max_tokens,
        }
        try:
            reply = read_completion(body)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            self.report.unreadable += 1
            self.record(request, "unreadable", usage | {"estimated": True}, text=body, **extra)
            return False
        estimated = usage | {"completion_tokens": len(reply["text"]) // 4, "estimated": True}
        self.record(request, "answered", reply.pop("usage") or estimated, **reply, **extra)
        return True

    def fail(self, request: Request, error: str) -> None:
        """Record that a sample was given up in this run."""
        self.record(request, "failed", {"prompt_tokens": 0, "completion_tokens": 0}, error=error)

    def record(self, request: Request, status: str, usage: dict, **extra: object) -> None:
        task, teacher, report = self.plan.task, self.plan.teacher, self.report
        cost = cost_usd(
            usage["prompt_tokens"],
            usage["completion_tokens"],
            teacher.price_per_mtok,
            batch=self.batch,
        )
        record = {
            "key": request.key,
            "task": task.name,
            "prompt_version": task.prompt_version,
            "model": teacher.model,
        }
        record |= {
            "sample_id": request.sample_id,
            "status": status,
            "usage": usage,
            "cost_usd": cost,
        }
        record |= {"time": round(time.time(), 1), "batch": self.batch}
        record |= {
            name: self.redact(value) if isinstance(value, str) else value
            for name, value in extra.items()
        }
        self.ledger.append(record)
        report.prompt_tokens += usage["prompt_tokens"]
        report.completion_tokens += usage["completion_tokens"]
        report.cost_usd += cost

    def redact(self, text: str) -> str:
        """A text from outside without the key, should the service echo it, and without what UTF-8
        cannot hold.
        """
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.secret, "[key removed]") if len(self.secret) > 4 else text
