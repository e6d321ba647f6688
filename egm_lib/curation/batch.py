"""OpenAI's Batch API: half the price, answers within a day.

Beside the ledger, `<ledger>.batches.jsonl` says which batches were prepared, submitted and
collected, so that a killed run neither loses one nor submits it twice. A batch carries its name as
metadata, by which it is found again on the service.

A request whose batch is refused for too many waiting tokens, or that the service has forgotten, is
pending again: it is submitted in a later batch, by this run or the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
from tqdm import tqdm

from egm_lib.curation.cost import SpendingCap
from egm_lib.curation.ledger import repair_end
from egm_lib.curation.options import CurationError, Refused
from egm_lib.curation.request_plan import CurationRequest, Plan, Receipts
from egm_lib.curation.services import refuses_everything
from egm_lib.files import iter_jsonl, json_line

log = logging.getLogger(__name__)

MAX_REQUESTS = 50_000  # a file, https://platform.openai.com/docs/guides/batch
MAX_BYTES = 190_000_000  # of 200 MB; a request is never near the 10 MB between
MAX_OPEN = 8  # batches at a time; the service's own limit is on waiting tokens
MAX_FORGOTTEN = 3  # batches that a run submits anew before it gives up
POLL_S = 60.0
ENDED = ("completed", "failed", "expired", "cancelled")
_TOKEN_LIMIT = re.compile(r"token_limit_exceeded|enqueued token limit", re.IGNORECASE)
_LIMIT = re.compile(r"limit:\s*([\d,]+)", re.IGNORECASE)


@dataclass
class Batch:
    """requests: key -> (sample_id, estimated prompt tokens). batch_id: None until submitted.

    sent: the options of its requests, None for a batch of an earlier run.
    """

    name: str
    requests: dict[str, tuple[str, int]]
    at_most_usd: float
    batch_id: str | None = None
    sent: dict | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.requests.values())


class BatchLog:
    """Append-only record of batches; protected by the ledger's lock."""

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_name(ledger.name + ".batches.jsonl")

    def open_batches(self) -> list[Batch]:
        """Batches that were prepared and neither collected nor forgotten."""
        batches: dict[str, Batch] = {}
        for number, event in enumerate(iter_jsonl(self.path) if self.path.exists() else (), 1):
            try:
                name, kind = str(event["name"]), event["event"]
                if kind == "prepared":
                    requests = {
                        key: (str(sample_id), int(tokens))
                        for key, (sample_id, tokens) in event["requests"].items()
                    }
                    batches[name] = Batch(name, requests, float(event["at_most_usd"]))
                elif kind == "submitted":
                    batches[name].batch_id = str(event["batch_id"])
                else:
                    batches.pop(name, None)
            except (KeyError, TypeError, ValueError, AttributeError):
                log.warning(
                    "%s: entry %d is not an event of a batch and is left out", self.path, number
                )
        return list(batches.values())

    def append(self, event: str, name: str, **more: object) -> None:
        with open(self.path, "a+b", buffering=0) as file:
            repair_end(file)
            file.write(json_line({"event": event, "name": name, **more}).encode())
            os.fsync(file.fileno())


async def run_batches(
    client: openai.AsyncOpenAI,
    plan: Plan,
    receipts: Receipts,
    budget_usd: float | None,
    stop: threading.Event,
    bar: tqdm,
) -> None:
    """Submit all pending samples in files within the limits, poll, and collect.

    Stopped, it leaves the batches on the service. Raises Refused or CurationError.
    """
    job = _BatchJob(client, plan, receipts, SpendingCap(budget_usd, receipts.ledger), stop, bar)
    try:
        async with client:
            await job.run()
    except openai.OpenAIError as error:
        message = receipts.redact(refuses_everything(error) or f"{type(error).__name__}: {error}")
        raise (Refused if refuses_everything(error) else CurationError)(
            f"{message}; run again to continue"
        ) from None


def _id(theirs: object) -> str:
    """The id of a file or a batch. Raises CurationError for a reply that has none."""
    found = getattr(theirs, "id", None)
    if not (found and isinstance(found, str)):
        raise CurationError(
            "the service has answered a file or a batch without an id; run again to continue"
        )
    return found


def _reasons(errors: object) -> str:
    """What a service says of a batch that failed: OpenAI's list, or whatever stands there."""
    listed = getattr(errors, "data", errors)
    listed = listed if isinstance(listed, list) else [listed]
    return "; ".join(
        f"{getattr(error, 'code', '') or ''} {getattr(error, 'message', error)}".strip()
        for error in listed
        if error
    )


class _BatchJob:
    def __init__(
        self,
        client: openai.AsyncOpenAI,
        plan: Plan,
        receipts: Receipts,
        budget: SpendingCap,
        stop: threading.Event,
        bar: tqdm,
    ) -> None:
        self.client, self.plan, self.receipts = client, plan, receipts
        self.budget, self.stop, self.bar = budget, stop, bar
        self.log = BatchLog(receipts.ledger.path)
        self.under_way: set[str] = set()  # keys that are not given out again by this run
        self.enqueued_limit = float("inf")  # estimated prompt tokens that may wait at a time
        self.open: list[Batch] = []
        self.forgotten = 0
        self.released = False  # whether requests have become pending again

    async def run(self) -> None:
        """Submit and collect until nothing is pending; the reasons to stop earlier are reported."""
        for batch in await self._adopt(self.log.open_batches()):
            self._opened(batch)
        pending, more = self.plan.pending(self.receipts.ledger, self.under_way), True
        while True:
            while more and self._has_room() and not self._stopping():
                more = await self._submit(pending)
            if not self.open and (self._stopping() or not self.released):
                return
            ended = [batch for batch in list(self.open) if await self._collect(batch)]
            if self.released:
                self.released = False
                pending, more = self.plan.pending(self.receipts.ledger, self.under_way), True
            if not self.open and not more:
                return
            if not ended and not await self._pause():
                names = ", ".join(batch.batch_id for batch in self.open)
                self.receipts.report.stopped = (
                    f"left on the service: {names}; run again to collect them"
                )
                return

    def _opened(self, batch: Batch) -> None:
        self.open.append(batch)
        self.under_way |= batch.requests.keys()
        self.budget.reserved_usd += batch.at_most_usd

    def _closed(self, batch: Batch, event: str) -> None:
        """A batch is no longer on the service: "collected", or "forgotten" with what it asked."""
        self.log.append(event, batch.name)
        self.open = [other for other in self.open if other is not batch]
        self.budget.reserved_usd -= batch.at_most_usd

    def _release(self, batch: Batch) -> None:
        """Requests without an answer are pending again."""
        ledger = self.receipts.ledger
        self.under_way -= {key for key in batch.requests if not ledger.answer(key)}
        self.released = True

    def _stopping(self) -> bool:
        return self.stop.is_set() or self.receipts.report.stopped is not None

    def _has_room(self) -> bool:
        return len(self.open) < MAX_OPEN and self._enqueued() < self.enqueued_limit

    def _enqueued(self) -> int:
        return sum(batch.prompt_tokens for batch in self.open)

    def _refuse_tokens(self, batch: Batch, message: str) -> None:
        """The service takes no more waiting tokens: this batch is pending again, in smaller ones.

        Its own count differs from our estimate, so that the limit it names is only a first guess.
        """
        report = self.receipts.report
        if self.enqueued_limit == float("inf"):
            report.notes.append(
                "the service limits the tokens that may wait: batches are smaller, and the rest "
                "waits here"
            )
        named = _LIMIT.search(message)
        limit = int(named[1].replace(",", "") or 0) if named else float("inf")
        self._closed(batch, "forgotten")
        half = (self._enqueued() + batch.prompt_tokens) // 2
        self.enqueued_limit = max(1, min(self.enqueued_limit, limit, half))
        self._release(batch)
        if not self.open and len(batch.requests) == 1:
            report.stopped = (
                f"the service takes no more requests now: {self.receipts.redact(message)[:300]}; "
                "run again later"
            )

    async def _adopt(self, batches: list[Batch]) -> list[Batch]:
        """Find the ids of batches whose submission was cut short.

        Those that never reached the service are forgotten.
        """
        lost = {batch.name: batch for batch in batches if batch.batch_id is None}
        if lost:
            async for theirs in self.client.batches.list(limit=100):
                about = getattr(theirs, "metadata", None)
                name = about.get("egm_batch") if isinstance(about, dict) else None
                if isinstance(name, str) and (batch := lost.pop(name, None)):
                    batch.batch_id = theirs.id
                    self.log.append("submitted", batch.name, batch_id=theirs.id)
                if not lost:
                    break
        for name in lost:
            self.log.append("forgotten", name)
        return [batch for batch in batches if batch.batch_id]

    async def _submit(self, pending: Iterator[CurationRequest | None]) -> bool:
        """Submit the next batch; returns whether more may follow."""
        name = uuid.uuid4().hex
        path = self.log.path.with_name(f".{name}.batch")
        try:
            batch, more = await asyncio.to_thread(self._write, path, name, pending)
            if not batch.requests:
                return more
            self.log.append(
                "prepared", name, requests=batch.requests, at_most_usd=batch.at_most_usd
            )
            with open(path, "rb") as file:
                uploaded = await self.client.files.create(
                    file=(f"{name}.jsonl", file), purpose="batch"
                )
            created = await self.client.batches.create(
                input_file_id=_id(uploaded),
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"egm_batch": name},
            )
        except openai.APIStatusError as error:
            if not _TOKEN_LIMIT.search(str(error)):
                raise
            self._refuse_tokens(batch, str(error))
            return more
        finally:
            path.unlink(missing_ok=True)
        batch.batch_id = _id(created)
        self.log.append("submitted", name, batch_id=batch.batch_id)
        self.open.append(batch)  # its cost was set aside, and its keys noted, while it was written
        self.receipts.report.asked += len(batch.requests)
        return more

    def _write(
        self, path: Path, name: str, pending: Iterator[CurationRequest | None]
    ) -> tuple[Batch, bool]:
        """Write one request file within the service's limits and the budget."""
        sent = self.plan.options.sent
        batch, tokens = Batch(name, {}, 0.0, sent=sent), self._enqueued()
        with open(path, "wb") as file:
            for request in pending:
                if request is None:
                    self.bar.update()
                    continue
                try:
                    body = self.plan.body(request) | sent
                except (OSError, ValueError) as error:
                    self.receipts.fail(request, str(error))
                    continue
                at_most_usd = self.plan.at_most_usd(request, batch=True)
                if not self.budget.take(at_most_usd):
                    self.receipts.report.stopped = self.budget.used_up
                    return batch, False
                line = {
                    "custom_id": request.key,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body,
                }
                file.write(json.dumps(line).encode() + b"\n")
                batch.requests[request.key] = (request.sample_id, request.prompt_tokens)
                batch.at_most_usd += at_most_usd
                tokens += request.prompt_tokens
                full = len(batch.requests) >= MAX_REQUESTS or file.tell() >= MAX_BYTES
                if full or tokens >= self.enqueued_limit or self.stop.is_set():
                    return batch, True
        return batch, False

    async def _collect(self, batch: Batch) -> bool:
        """Put an ended batch's replies into the ledger; False while it has not ended."""
        try:
            theirs = await self.client.batches.retrieve(batch.batch_id)
        except openai.NotFoundError:
            self._forget(batch, f"batch {batch.batch_id}")
            return True
        except (ValueError, RecursionError):  # no JSON, such as a gateway's page: ask again
            return False
        if getattr(theirs, "status", None) not in ENDED:
            return False
        reasons = _reasons(theirs.errors)
        if theirs.status == "failed" and _TOKEN_LIMIT.search(reasons):
            if batch.sent is not None:  # it was asked by this run
                self.receipts.report.asked -= len(batch.requests)
            self._refuse_tokens(batch, reasons)
            return True
        for file_id in (theirs.output_file_id, theirs.error_file_id):
            if not (file_id and isinstance(file_id, str)):
                continue
            try:
                content = await self.client.files.content(file_id)
            except openai.NotFoundError:
                self._forget(batch, f"file {file_id} of batch {batch.batch_id}")
                return True
            # str.splitlines would also cut at U+2028 within an answer
            for line in content.content.split(b"\n"):
                if line.strip():
                    self._receive(batch, line)
        for key, (sample_id, prompt) in batch.requests.items():
            waiting = key in self.under_way and not self.receipts.ledger.answer(key)
            if waiting and not self.receipts.ledger.failure(key):
                reason = f"batch {batch.batch_id} {theirs.status} without an answer: {reasons}"
                self.receipts.fail(CurationRequest(key, sample_id, prompt), reason)
        self.receipts.ledger.sync()
        self._closed(batch, "collected")
        self.bar.update(len(batch.requests))
        return True

    def _forget(self, batch: Batch, what: str) -> None:
        """The service no longer knows a batch or its file: what is unanswered is pending again."""
        self._closed(batch, "forgotten")
        self._release(batch)
        self.forgotten += 1
        self.receipts.report.notes.append(
            f"the service has forgotten {what}: its requests are asked again"
        )
        if self.forgotten >= MAX_FORGOTTEN:
            self.receipts.report.stopped = (
                f"the service has forgotten {self.forgotten} batches; run again when it is well"
            )

    def _receive(self, batch: Batch, text: bytes) -> None:
        """Record one line of a result file; an odd one is counted, and the others are collected."""
        try:
            line = json.loads(text)
            key, response = line["custom_id"], line.get("response") or {}
            status, body = response.get("status_code"), response.get("body")
            known = key in batch.requests
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.receipts.report.unreadable += 1
            return
        if not known or self.receipts.ledger.answer(key):
            return
        request = CurationRequest(key, *batch.requests[key])
        if status == 200:
            fault = self.receipts.receive(request, body)
            if fault:
                self.receipts.fail(request, fault)
            return
        message = json.dumps(line.get("error") or body)
        sent = self.plan.sampling if batch.sent is None else batch.sent
        if status in (400, 422) and self.plan.options.learn(message, sent):
            self.under_way.discard(key)  # pending again, with other options
            self.released = True
            return
        self.receipts.fail(request, message[:500])

    async def _pause(self) -> bool:
        """Wait before the next look at the batches; False when the run is to stop."""
        until = time.monotonic() + POLL_S
        while time.monotonic() < until and not self.stop.is_set():
            await asyncio.sleep(min(1.0, POLL_S))
        return not self.stop.is_set()
