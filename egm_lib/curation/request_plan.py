"""What a run asks, and how replies reach the ledger; the same for single requests and batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from egm_lib.curation.cost import cost_usd, prompt_tokens
from egm_lib.curation.ledger import Ledger
from egm_lib.curation.options import AcceptedOptions, sampling_options
from egm_lib.curation.replies import read_reply
from egm_lib.curation.tasks import CurationTask, messages, request_key
from egm_lib.data import resolve_image
from egm_lib.files import writable
from egm_lib.profile import Teacher

MAX_LISTED = 20  # failures that a report shows; the output file has all


class CurationRequest(NamedTuple):
    """One sample to ask about.

    prompt_tokens: an estimate. sample, image: None once a batch has been sent.
    """

    key: str
    sample_id: str
    prompt_tokens: int
    sample: Mapping | None = None
    image: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A task, the samples to ask about, and whom to ask.

    root: the folder that the samples' `image` is relative to.
    """

    task: CurationTask
    samples: Iterable[Mapping]
    teacher: Teacher
    root: Path

    @cached_property
    def sampling(self) -> dict:
        """The options as the profile wants them: part of every request's key."""
        temperature = self.teacher.temperature
        if temperature is not None and self.task.fixed_temperature is not None:
            temperature = self.task.fixed_temperature
        return sampling_options(self.teacher, temperature)

    @cached_property
    def options(self) -> AcceptedOptions:
        """The options as the service accepts them: what is sent."""
        return AcceptedOptions(self.sampling)

    def request(self, sample: Mapping) -> CurationRequest:
        """The request of a sample; raises OSError or ValueError where its image is missing."""
        image = resolve_image(sample, self.root)
        key = request_key(self.task, sample, image, self.teacher.model, self.sampling)
        return CurationRequest(
            key, sample["sample_id"], prompt_tokens(self.task, sample), sample, image
        )

    def keyless(self, sample: Mapping) -> CurationRequest:
        """A request for estimates only: does not look at the image."""
        return CurationRequest("", sample["sample_id"], prompt_tokens(self.task, sample))

    def body(self, request: CurationRequest) -> dict:
        """The chat request; reads and marks the image, so raises OSError or ValueError."""
        content = messages(self.task, request.sample, request.image)
        return {"model": self.teacher.model, "messages": content}

    def pending(self, ledger: Ledger, under_way: set[str]) -> Iterator[CurationRequest | None]:
        """A request for every sample without an answer, None for every other sample.

        under_way: keys of the requests that were given out; none of them is given out again.
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

    def at_most_usd(self, request: CurationRequest, *, batch: bool = False) -> float:
        """What a request costs when its answer is as long as allowed."""
        return cost_usd(
            request.prompt_tokens, self.teacher.max_tokens, self.teacher.price_per_mtok, batch=batch
        )


@dataclass
class Report:
    """What a run did: how many samples were kept, dropped or failed, and what was asked and paid.

    dropped: by filter. waiting: not asked yet. unreadable: replies that were no answers. stopped:
    why the run ended early. failures: the first MAX_LISTED. notes: what the user should know. out:
    the output file.
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
    notes: list[str] = field(default_factory=list)
    out: Path | None = None

    def __str__(self) -> str:
        total = self.kept + self.dropped.total() + self.failed + self.waiting
        lines = [
            f"{self.task} by {self.model}: {total} samples; in this run {self.asked} asked, "
            f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens, "
            f"{self.cost_usd:.4f} USD, {self.wall_s:.1f} s"
        ]
        rows = [
            ("kept", self.kept),
            *((f"dropped: {name}", count) for name, count in self.dropped.most_common()),
        ]
        rows += [("failed", self.failed), ("not asked yet", self.waiting)]
        lines += [f"  {name:<32} {count:>8}" for name, count in rows if count or name == "kept"]
        if self.unreadable:
            lines.append(
                f"  {self.unreadable} replies were no answers; the budget counts them as charged"
            )
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  failed: {sample_id}: {error}" for sample_id, error in self.failures]
        if self.failed > len(self.failures):
            lines.append(f"  ... and {self.failed - len(self.failures)} more, in the output file")
        return "\n".join([*lines, *([self.stopped] if self.stopped else [])])


@dataclass
class Receipts:
    """Puts replies into the ledger and counts them. secret: the service's key, never recorded."""

    plan: Plan
    ledger: Ledger
    report: Report
    secret: str
    batch: bool = False

    def receive(self, request: CurationRequest, body: object, **extra: object) -> str | None:
        """Record a reply; returns why it is no answer, None for an answer.

        An answer that was cut, or that the service declined to give, is recorded as it is: asking
        again would give the same, and the filters drop it.
        """
        reply = read_reply(body)
        usage = {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        answered = reply.finish != "error" or reply.declined
        if None in usage.values():
            most = len(reply.text) // 4 if answered else self.plan.teacher.max_tokens
            usage = {"prompt_tokens": request.prompt_tokens, "completion_tokens": most}
            usage["estimated"] = True
        if not answered:
            self.report.unreadable += 1
            text = body if isinstance(body, str) else reply.text
            self.record(request, "unreadable", usage, text=text, error=reply.error, **extra)
            return reply.error
        kept = {
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "refusal": reply.refusal,
            "response_id": reply.response_id,
        }
        self.record(request, "answered", usage, **kept, **extra)
        return None

    def fail(self, request: CurationRequest, error: str) -> None:
        """Record that a sample was given up in this run."""
        self.record(request, "failed", {"prompt_tokens": 0, "completion_tokens": 0}, error=error)

    def record(self, request: CurationRequest, status: str, usage: dict, **extra: object) -> None:
        """Append a record to the ledger and count it."""
        task, teacher, report = self.plan.task, self.plan.teacher, self.report
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        cost = cost_usd(prompt, completion, teacher.price_per_mtok, batch=self.batch)
        record = {
            "key": request.key,
            "task": task.name,
            "prompt_version": task.prompt_version,
            "model": teacher.model,
            "sample_id": request.sample_id,
            "status": status,
            "usage": usage,
            "cost_usd": cost,
            "time": round(time.time(), 1),
            "batch": self.batch,
        }
        for name, value in extra.items():
            record[name] = self.redact(value) if isinstance(value, str) else value
        self.ledger.append(record)
        report.prompt_tokens += prompt
        report.completion_tokens += completion
        report.cost_usd += cost

    def redact(self, text: str) -> str:
        """A text from outside without the key, should the service echo it, and fit for UTF-8."""
        text = writable(text)
        return text.replace(self.secret, "[key removed]") if len(self.secret) > 4 else text
