"""OpenAI's Batch API as a transport: half the price, answers within a day.

Beside the ledger, `<ledger>.batches.jsonl` says which batches were prepared, submitted and
collected, so that a killed run neither loses one nor submits it twice: a batch carries its name as
metadata and is found again on the service.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
from tqdm import tqdm

from egm_lib.curation.cost import SpendingCap
from egm_lib.curation.request_plan import CurationRequest, Plan, Receipts
from egm_lib.curation.services import CurationError, Refused, refuses_everything

MAX_REQUESTS = 50_000  # a file, https://platform.openai.com/docs/guides/batch
MAX_BYTES = 190_000_000  # of 200 MB; a request is never near the 10 MB between
MAX_OPEN = 8  # batches at a time; the service's own limit is on tokens waiting
POLL_S = 60.0
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class Batch:
    """requests: key -> (sample_id, estimated prompt tokens); batch_id: None until it is
    submitted.
    """

    name: str
    requests: dict[str, tuple[str, int]]
    at_most_usd: float
    batch_id: str | None = None


class BatchLog:
    """Append-only record of batches; protected by the ledger's lock."""

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.with_name(ledger.name + ".batches.jsonl")

    def open_batches(self) -> list[Batch]:
        """Batches that were prepared and not collected or forgotten."""
        batches: dict[str, Batch] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if not line.endswith("\n"):
                    break  # torn by a kill before anything was sent in its name
                event = json.loads(line)
                if event["event"] == "prepared":
                    batches[event["name"]] = Batch(
                        event["name"], event["requests"], event["at_most_usd"]
                    )
                elif event["event"] == "submitted":
                    batches[event["name"]].batch_id = event["batch_id"]
                else:
                    del batches[event["name"]]
        return list(batches.values())

    def append(self, event: str, name: str, **more: object) -> None:
        text = self.path.read_bytes() if self.path.exists() else b""
        with open(self.path, "r+b" if text else "wb") as file:
            file.seek(text.rfind(b"\n") + 1)  # over a torn last line
            file.truncate()
            file.write(json.dumps({"event": event, "name": name, **more}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


async def run_batches(
    client: openai.AsyncOpenAI,
    plan: Plan,
    receipts: Receipts,
    budget_usd: float | None,
    stop: threading.Event,
    bar: tqdm,
) -> None:
    """Submit all pending samples in files within the limits, poll, collect; stopped, leave the
    batches on the service.

    Raises Refused or CurationError.
    """
    job = _BatchJob(client, plan, receipts, SpendingCap(budget_usd, receipts.ledger), stop, bar)
    try:
        async with client:
            await job.run()
    except openai.OpenAIError as error:
        message = receipts.redact(refuses_everything(error) or f"{type(error).__name__}: {error}")
        raise (Refused if refuses_everything(error) else CurationError)(
            f"{message}; run again to go on"
        ) from None


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
        self.under_way: set[str] = set()

    async def run(self) -> None:
        open_batches = await self._adopt(self.log.open_batches())
        for batch in open_batches:
            self.under_way |= batch.requests.keys()
            self.budget.reserved_usd += batch.at_most_usd
        pending, more = self.plan.pending(self.receipts.ledger, self.under_way), True
        while True:
            while more and len(open_batches) < MAX_OPEN and not self.stop.is_set():
                batch, more = await self._submit(pending)
                open_batches += [batch] if batch else []
            if not open_batches:
                return
            ended = [batch for batch in open_batches if await self._collect(batch)]
            open_batches = [batch for batch in open_batches if batch not in ended]
            if not ended and not await self._pause():
                names = ", ".join(batch.batch_id for batch in open_batches)
                self.receipts.report.stopped = (
                    f"left on the service: {names}; run again to collect them"
                )
                return

    async def _adopt(self, batches: list[Batch]) -> list[Batch]:
        """Find the ids of batches whose submission a kill cut short; forget those that never
        reached the service.
        """
        lost = {batch.name: batch for batch in batches if batch.batch_id is None}
        if lost:
            async for theirs in self.client.batches.list(limit=100):
                if batch := lost.pop((theirs.metadata or {}).get("egm_batch"), None):
                    batch.batch_id = theirs.id
                    self.log.append("submitted", batch.name, batch_id=theirs.id)
                if not lost:
                    break
        for name in lost:
            self.log.append("forgotten", name)
        return [batch for batch in batches if batch.batch_id]

    async def _submit(self, pending: Iterator[CurationRequest | None]) -> tuple[Batch | None, bool]:
        """(the next batch, whether more may follow)."""
        name = uuid.uuid4().hex
        path = self.log.path.with_name(f".{name}.batch")
        try:
            batch, more = await asyncio.to_thread(self._write, path, name, pending)
            if not batch.requests:
                return None, more
            self.log.append(
                "prepared", name, requests=batch.requests, at_most_usd=batch.at_most_usd
            )
            with open(path, "rb") as file:
                uploaded = await self.client.files.create(
                    file=(f"{name}.jsonl", file), purpose="batch"
                )
            created = await self.client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"egm_batch": name},
            )
            batch.batch_id = created.id
            self.log.append("submitted", name, batch_id=created.id)
            self.receipts.report.asked += len(batch.requests)
            return batch, more
        finally:
            path.unlink(missing_ok=True)

    def _write(
        self, path: Path, name: str, pending: Iterator[CurationRequest | None]
    ) -> tuple[Batch, bool]:
        """Write one request file within the service's limits and the budget."""
        batch = Batch(name, {}, 0.0)
        with open(path, "wb") as file:
            for request in pending:
                if request is None:
                    self.bar.update()
                    continue
                try:
                    body = self.plan.body(request)
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
                if (
                    len(batch.requests) >= MAX_REQUESTS
                    or file.tell() >= MAX_BYTES
                    or self.stop.is_set()
                ):
                    return batch, True
        return batch, False

    async def _collect(self, batch: Batch) -> bool:
        """Put an ended batch's replies into the ledger; False while it is not ended."""
        theirs = await self.client.batches.retrieve(batch.batch_id)
        if theirs.status not in ENDED:
            return False
        for file_id in (theirs.output_file_id, theirs.error_file_id):
            if file_id:
                content = await self.client.files.content(file_id)
                # str.splitlines would cut at U+2028 within an answer too
                for line in content.content.split(b"\n"):
                    if line.strip():
                        self._receive(batch, line)
        reasons = [error.message for error in (theirs.errors.data if theirs.errors else None) or []]
        for key, (sample_id, prompt) in batch.requests.items():
            if not (self.receipts.ledger.answer(key) or self.receipts.ledger.failure(key)):
                why = "; ".join(map(str, reasons))
                reason = f"batch {batch.batch_id} {theirs.status} without an answer: {why}"
                self.receipts.fail(CurationRequest(key, sample_id, prompt), reason)
        self.receipts.ledger.sync()
        self.log.append("collected", batch.name)
        self.budget.reserved_usd -= batch.at_most_usd
        self.bar.update(len(batch.requests))
        return True

    def _receive(self, batch: Batch, text: bytes) -> None:
        try:
            line = json.loads(text)
            key, response = line["custom_id"], line.get("response") or {}
        except (ValueError, KeyError, TypeError, AttributeError):
            # One odd line must not keep the others from being collected
            self.receipts.report.unreadable += 1
            return
        if key not in batch.requests or self.receipts.ledger.answer(key):
            return
        request = CurationRequest(key, *batch.requests[key])
        if response.get("status_code") == 200 and self.receipts.receive(
            request, json.dumps(response["body"])
        ):
            return
        self.receipts.fail(request, json.dumps(line.get("error") or response.get("body"))[:500])

    async def _pause(self) -> bool:
        """Wait before the next look at the batches; False when the run shall stop."""
        until = time.monotonic() + POLL_S
        while time.monotonic() < until and not self.stop.is_set():
            await asyncio.sleep(min(1.0, POLL_S))
        return not self.stop.is_set()
