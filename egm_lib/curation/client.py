"""One asynchronous client for every service: concurrency, retries, a budget, a ledger; then filters and the output file."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import httpx2
import openai
from tqdm import tqdm

from egm_lib.curation.filters import Reply
from egm_lib.curation.ledger import Ledger, LedgerError
from egm_lib.curation.tasks import MAX_SIDE_PX, Task, messages, request_key
from egm_lib.data import resolve_image
from egm_lib.data.records import atomic_open
from egm_lib.profile import Price, Teacher

MINI = "mini"  # base_url of the miniature world's teacher, in process
BATCH_DISCOUNT = 0.5  # OpenAI's Batch API
READ_TRIES = 3  # a reply that is no chat completion (half a JSON, an error page with status 200) is asked for again


class CurationError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


class Stopped(CurationError):
    """The service refuses everything (wrong key, wrong model, no credit): going on would fail every sample."""


def api_key(base_url: str, variable: str = "OPENAI_API_KEY") -> str:
    """The key of a service, from the environment only; local and in-process services need none."""
    key = os.environ.get(variable, "")
    if not key and not is_local(base_url):
        raise CurationError(f"no key for {base_url}: set the environment variable {variable}")
    return key or "none"


def is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    return base_url == MINI or host == "localhost" or host.startswith("127.") or host == "::1"


def connect(base_url: str, key: str, *, root: Path, timeout_s: float, max_retries: int) -> openai.AsyncOpenAI:
    """The openai client of a service. base_url "mini" is answered in process from `root/teacher.jsonl`."""
    if base_url == MINI:
        from egm_lib.mini.teacher import TeacherTransport

        return openai.AsyncOpenAI(
            base_url="http://mini.invalid/v1",
            api_key=key,
            max_retries=max_retries,
            http_client=httpx2.AsyncClient(transport=TeacherTransport(root / "teacher.jsonl")),
        )
    address = urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise CurationError(
            f"base URL {base_url!r} is none: give one like https://api.openai.com/v1 or http://localhost:8000/v1"
        )
    if address.password or address.query:
        raise CurationError("the base URL holds a password or a query; keys belong in the environment only")
    # a proxy set for the outside world is not asked for this machine
    http_client = openai.DefaultAsyncHttpxClient(trust_env=not is_local(base_url))
    timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, 15.0))
    return openai.AsyncOpenAI(
        base_url=base_url, api_key=key, timeout=timeout, max_retries=max_retries, http_client=http_client
    )


def sampling_options(model: str, temperature: float, max_tokens: int) -> dict:
    """Sampling as the service wants it: OpenAI's reasoning models take no temperature and call the limit otherwise."""
    if re.match(r"(.*/)?(o\d|gpt-5)", model):
        return {"max_completion_tokens": max_tokens}
    return {"temperature": temperature, "max_tokens": max_tokens}


class Request(NamedTuple):
    """One sample to ask about."""

    key: str
    sample: Mapping
    image: Path


@dataclass
class Report:
    """What a run did. kept, dropped (by filter), failed and waiting (budget, limit of patience) count this run's samples."""

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
    failures: list[tuple[str, str]] = field(default_factory=list)  # the first MAX_LISTED; all are in the output file

    def __str__(self) -> str:
        total = self.kept + self.dropped.total() + self.failed + self.waiting
        lines = [
            f"{self.task} by {self.model}: {total} samples, {self.asked} asked now, {self.prompt_tokens:,} + "
            f"{self.completion_tokens:,} tokens, {self.cost_usd:.4f} USD, {self.wall_s:.1f} s"
        ]
        rows = [
            ("kept", self.kept),
            *((f"dropped: {name}", count) for name, count in self.dropped.most_common()),
            ("failed", self.failed),
            ("not asked yet", self.waiting),
        ]
        lines += [f"  {name:<32} {count:>8}" for name, count in rows if count or name == "kept"]
        if self.unreadable:
            lines.append(
                f"  {self.unreadable} unreadable replies may have been charged; they count in the budget as if they were"
            )
        lines += [f"  failed: {sample_id}: {error}" for sample_id, error in self.failures]
        if self.failed > len(self.failures):
            lines.append(f"  ... and {self.failed - len(self.failures)} more, in the output file")
        return "\n".join(lines + ([self.stopped] if self.stopped else []))


MAX_LISTED = 20


@dataclass(frozen=True)
class Estimate:
    """What a run would ask and cost. basis: where the token counts come from."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    at_most_usd: float
    basis: str

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens: "
            f"about {self.cost_usd:,.2f} USD, at most {self.at_most_usd:,.2f} USD ({self.basis})"
        )


def picture_tokens(width: int, height: int) -> int:
    """Prompt tokens of a picture by OpenAI's published rule for gpt-4o and gpt-4.1 at high detail: 85 + 170 a 512 px tile,
    the shorter side at most 768 px. Other services count otherwise; once there are answers, their usage is the estimate."""
    scale = min(1.0, MAX_SIDE_PX / max(width, height), 768 / min(width, height))
    return 85 + 170 * -(-int(width * scale) // 512) * -(-int(height * scale) // 512)


def prompt_tokens(task: Task, sample: Mapping) -> int:
    """Estimate: four characters of English a token, and the picture."""
    return len(task.prompt(sample)) // 4 + picture_tokens(sample["width"], sample["height"])


def cost_usd(prompt: float, completion: float, price: Price | None, *, batch: bool = False) -> float:
    if price is None:
        return 0.0
    return (prompt * price.prompt + completion * price.completion) / 1e6 * (BATCH_DISCOUNT if batch else 1.0)


class JsonlSamples:
    """The rows of a JSONL file, read anew at every iteration and never held together."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CurationError(f"no file {self.path}")

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise CurationError(f"{self.path}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise CurationError(f"{self.path}, line {number}: not an object with fields")
                yield row


def count_checked(task: Task, samples: Iterable[Mapping]) -> int:
    """Number of samples; raises CurationError for the first that the task cannot use, before anything is paid."""
    number = 0
    for number, sample in enumerate(samples, 1):
        for name in task.needs:
            value = sample.get(name)
            if value is None and not (name == "box" and "box" in sample):
                hint = "; give prediction rows, whose `box` is the prediction" if name == "box" else ""
                raise CurationError(
                    f"sample {number} ({sample.get('sample_id')!r}) has no {name!r}, which {task.name} needs{hint}"
                )
            if name.endswith("box") and value is not None and not _is_box(value):
                raise CurationError(
                    f"sample {number} ({sample['sample_id']!r}): {name} = {value!r} is no box "
                    "(x1 < x2, y1 < y2, four finite numbers in pixels)"
                )
    return number


def _is_box(value: object) -> bool:
    try:
        x1, y1, x2, y2 = value
        return x1 < x2 and y1 < y2 and all(map(math.isfinite, (x1, y1, x2, y2)))
    except (TypeError, ValueError):
        return False


def run_task(
    task: Task,
    samples: Iterable[Mapping],
    teacher: Teacher,
    *,
    out: Path,
    ledger: Path,
    root: Path,
    limit: int | None = None,
    budget_usd: float | None = None,
    skip_filters: Iterable[str] = (),
    key: str | None = None,
    batch: bool = False,
    timeout_s: float = 120.0,
    max_retries: int = 8,
    progress: bool = True,
) -> Report:
    """Ask a service about every sample that the ledger does not answer yet, filter, write `out`.

    samples: iterated several times (a list, a Dataset, JsonlSamples); root: what their `image` is relative to.
    out: a row a sample in their order, {sample_id, answer, status, filter, error, usage, raw, task, model, key}; status "ok",
    "filtered" (filter says why) or "failed"; samples not asked yet have none. limit: the first so many samples.
    budget_usd: cap on all that this ledger has paid and will pay. key: of the service, default from the environment.
    Ctrl-C waits for the requests under way; started again, the same call goes on. Works in a notebook's event loop too.
    Raises CurationError, LedgerError.
    """
    if unknown := set(skip_filters) - {name for name, _ in task.filters}:
        raise CurationError(
            f"task {task.name} has no filter {min(unknown)!r}; it has {', '.join(name for name, _ in task.filters)}"
        )
    if budget_usd is not None and teacher.price_per_mtok is None:
        raise CurationError(
            f"a budget needs the price of {teacher.model}: set price_per_mtok in the profile, or --price on the command line"
        )
    key = key or api_key(teacher.base_url)
    chosen = _First(samples, limit)
    total = count_checked(task, chosen)
    report = Report(task.name, teacher.model)
    started = time.monotonic()
    with (
        Ledger(ledger) as book,
        tqdm(
            total=total,
            desc=task.name,
            unit="sample",
            disable=not progress,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        ) as bar,
    ):
        job = _Job(task, chosen, teacher, book, root, key, budget_usd, timeout_s, max_retries, report, bar)
        try:
            if batch:
                from egm_lib.curation.batch import run_batches

                _run_anywhere(run_batches(job), job.stop)
            else:
                _run_anywhere(job.run(), job.stop)
        finally:
            report.wall_s = time.monotonic() - started
        _write_output(job, out, frozenset(skip_filters))
    return report


@dataclass(frozen=True)
class _First:
    """The first `limit` samples, as often as one likes."""

    samples: Iterable[Mapping]
    limit: int | None

    def __iter__(self) -> Iterator[Mapping]:
        return islice(self.samples, self.limit)


class _Job:
    """The state that the requests of one run share."""

    def __init__(
        self,
        task: Task,
        samples: Iterable[Mapping],
        teacher: Teacher,
        ledger: Ledger,
        root: Path,
        key: str,
        budget_usd: float | None,
        timeout_s: float,
        max_retries: int,
        report: Report,
        bar: tqdm,
    ) -> None:
        self.task, self.samples, self.teacher, self.ledger, self.root = task, samples, teacher, ledger, root
        self.secret, self.budget_usd, self.timeout_s, self.max_retries = key, budget_usd, timeout_s, max_retries
        self.report, self.bar = report, bar
        self.stop = threading.Event()  # set by Ctrl-C, an empty budget, or a service that refuses everything
        self.error: Exception | None = None
        self._under_way: set[str] = set()
        self._reserved_usd = 0.0
        self._settled = asyncio.Condition()
        self._failures_in_a_row = 0

    async def run(self) -> None:
        """Ask about all pending samples, `concurrency` at a time."""
        async with connect(
            self.teacher.base_url, self.secret, root=self.root, timeout_s=self.timeout_s, max_retries=self.max_retries
        ) as client:
            pending = self.pending()
            syncing = asyncio.create_task(self._sync_often())
            async with asyncio.TaskGroup() as workers:
                for _ in range(self.teacher.concurrency):
                    workers.create_task(self._work(pending, client))
            syncing.cancel()
            with suppress(asyncio.CancelledError):
                await syncing
        if self.error:
            raise self.error

    def request(self, sample: Mapping) -> Request:
        """The request of a sample; raises OSError or ValueError where its picture cannot be found."""
        image = resolve_image(sample, self.root)
        key = request_key(
            self.task,
            sample,
            image,
            model=self.teacher.model,
            temperature=self.teacher.temperature,
            max_tokens=self.teacher.max_tokens,
        )
        return Request(key, sample, image)

    def pending(self) -> Iterator[Request | None]:
        """Requests without an answer; None now and then while passing over answered ones, to let others work."""
        for number, sample in enumerate(self.samples):
            try:
                request = self.request(sample)
            except (OSError, ValueError):
                request = None  # listed with its reason when the output is written
            if request and request.key not in self._under_way and self.ledger.answer(request.key) is None:
                self._under_way.add(request.key)
                yield request
            else:
                self.bar.update()
                if number % 256 == 0:
                    yield None

    async def _work(self, pending: Iterator[Request | None], client: openai.AsyncOpenAI) -> None:
        while not self.stop.is_set() and (request := next(pending, self)) is not self:
            if request is None:
                await asyncio.sleep(0)
                continue
            try:
                await self._ask(request, client)
            except (Stopped, LedgerError) as error:
                self.error = self.error or error
                self.stop.set()
            finally:
                self._under_way.discard(request.key)
                self.bar.update()

    async def _ask(self, request: Request, client: openai.AsyncOpenAI) -> None:
        """One sample's way to a record in the ledger."""
        try:
            content = await asyncio.to_thread(messages, self.task, request.sample, request.image)
        except (OSError, ValueError) as error:
            self.record(request, "failed", error=str(error))
            return
        at_most_usd = self.at_most_usd(request.sample)
        if not await self._reserve(at_most_usd):
            self.stop.set()
            return
        self.report.asked += 1
        try:
            async with asyncio.timeout((self.max_retries + 1) * (self.timeout_s + 60)):
                await self._fetch(request, content, client)
            self._failures_in_a_row = 0
        except (openai.OpenAIError, TimeoutError) as error:
            if refusal := _refuses_everything(error):
                raise Stopped(self.redact(f"{self.teacher.base_url} refuses: {refusal}")) from None
            self.record(request, "failed", error=f"{type(error).__name__}: {error}")
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= max(100, 4 * self.teacher.concurrency):
                raise Stopped(
                    self.redact(
                        f"{self._failures_in_a_row} requests in a row failed, the last with {error}; "
                        "run again when the service is back"
                    )
                ) from None
        finally:
            async with self._settled:
                self._reserved_usd -= at_most_usd
                self._settled.notify_all()

    async def _fetch(self, request: Request, content: list[dict], client: openai.AsyncOpenAI) -> None:
        options = sampling_options(self.teacher.model, self.teacher.temperature, self.teacher.max_tokens)
        headers = {"X-EGM-Sample": quote(request.sample["sample_id"], safe=" :/+,=@#"), "X-EGM-Task": self.task.name}
        for _ in range(READ_TRIES):
            started = time.monotonic()
            response = await client.chat.completions.with_raw_response.create(
                model=self.teacher.model, messages=content, extra_headers=headers, **options
            )
            # Paid from here on: nothing may wait or fail before it is in the ledger.
            if self.receive(request, response.text, latency_ms=round((time.monotonic() - started) * 1000, 1)):
                return
        self.record(
            request,
            "failed",
            error=f"{READ_TRIES} replies that are no chat completions, the last: {response.text[:200]!r}",
        )

    def receive(self, request: Request, body: str, *, batch: bool = False, **extra: object) -> bool:
        """Put a reply into the ledger; False for one that is no chat completion."""
        try:
            reply = read_completion(body)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            self.report.unreadable += 1
            usage = {
                "prompt_tokens": prompt_tokens(self.task, request.sample),
                "completion_tokens": self.teacher.max_tokens,
                "estimated": True,
            }
            self.record(request, "unreadable", usage=usage, batch=batch, text=body, **extra)
            return False
        if reply["usage"] is None:
            reply["usage"] = {
                "prompt_tokens": prompt_tokens(self.task, request.sample),
                "completion_tokens": len(reply["text"]) // 4,
                "estimated": True,
            }
        self.record(request, "answered", batch=batch, **reply, **extra)
        return True

    def record(
        self, request: Request, status: str, *, usage: dict | None = None, batch: bool = False, **extra: object
    ) -> None:
        usage = usage or {"prompt_tokens": 0, "completion_tokens": 0}
        cost = cost_usd(usage["prompt_tokens"], usage["completion_tokens"], self.teacher.price_per_mtok, batch=batch)
        extra = {name: self.redact(value) if isinstance(value, str) else value for name, value in extra.items()}
        self.ledger.append(
            {
                "key": request.key,
                "task": self.task.name,
                "prompt_version": self.task.prompt_version,
                "model": self.teacher.model,
                "sample_id": request.sample["sample_id"],
                "status": status,
                "usage": usage,
                "cost_usd": cost,
                "time": round(time.time(), 1),
                **extra,
            }
        )
        self.report.prompt_tokens += usage["prompt_tokens"]
        self.report.completion_tokens += usage["completion_tokens"]
        self.report.cost_usd += cost
        self.bar.set_postfix_str(f"{self.ledger.cost_usd:.4f} USD", refresh=False)

    def redact(self, text: str) -> str:
        """A text from outside without the key, should the service echo it; and without what UTF-8 cannot hold."""
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.secret, "[key removed]") if len(self.secret) > 4 else text

    def at_most_usd(self, sample: Mapping, *, batch: bool = False) -> float:
        return cost_usd(
            prompt_tokens(self.task, sample), self.teacher.max_tokens, self.teacher.price_per_mtok, batch=batch
        )

    async def _reserve(self, usd: float) -> bool:
        """Set aside what a request may cost at most; waits for others to settle; False when the budget is used up."""
        async with self._settled:
            while self.budget_usd is not None and self.ledger.cost_usd + self._reserved_usd + usd > self.budget_usd:
                if self._reserved_usd < 1e-12 or self.stop.is_set():
                    self.report.stopped = (
                        f"the budget of {self.budget_usd} USD is used up ({self.ledger.cost_usd:.4f} USD paid); run again "
                        "with a larger one to go on"
                    )
                    return False
                await self._settled.wait()
            self._reserved_usd += usd
            return True

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(5)
            await asyncio.to_thread(self.ledger.sync)


def read_completion(body: str) -> dict:
    """What the ledger keeps of a chat completion; raises where the body is none."""
    completion = json.loads(body)
    choice = completion["choices"][0]
    content = choice["message"].get("content") or ""
    if isinstance(content, list):  # some services answer in parts
        content = "".join(part.get("text", "") for part in content)
    usage = completion.get("usage")
    if usage is not None:
        usage = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens")}
    return {
        "text": str(content),
        "finish_reason": choice.get("finish_reason"),
        "refusal": choice["message"].get("refusal"),
        "usage": usage,
        "response_id": completion.get("id"),
    }


def _refuses_everything(error: Exception) -> str | None:
    """A reason that would fail every other sample too, None where this one is alone."""
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError):
        return str(error)
    if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
        return str(error)
    return None


def _run_anywhere(work: Coroutine, stop: threading.Event) -> None:
    """asyncio.run, also where a loop runs already (notebooks). The first Ctrl-C sets `stop`, the second raises."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

            def stop_gently(*_: object) -> None:
                stop.set()
                print("stopping: waiting for the requests under way (again to drop them)", file=sys.stderr)
                for number, handler in before.items():
                    signal.signal(number, handler)

            for number in before:
                signal.signal(number, stop_gently)
            try:
                asyncio.run(work)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        else:
            asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, work)
        try:
            future.result()
        except KeyboardInterrupt:
            stop.set()
            future.result()


def _write_output(job: _Job, out: Path, skip_filters: frozenset[str]) -> None:
    """The output file from the ledger, whole or not at all; counts into the report."""
    report = job.report
    with atomic_open(Path(out)) as file:
        for sample in job.samples:
            row = _output_row(job, sample, skip_filters)
            if row is None:
                report.waiting += 1
                continue
            if row["status"] == "ok":
                report.kept += 1
            elif row["status"] == "filtered":
                report.dropped[row["filter"]] += 1
            else:
                report.failed += 1
                if len(report.failures) < MAX_LISTED:
                    report.failures.append((row["sample_id"], row["error"]))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _output_row(job: _Job, sample: Mapping, skip_filters: frozenset[str]) -> dict | None:
    row = {
        "sample_id": sample["sample_id"],
        "answer": None,
        "status": "failed",
        "filter": None,
        "error": None,
        "usage": None,
        "raw": None,
        "task": job.task.name,
        "model": job.teacher.model,
        "key": None,
    }
    try:
        key = job.request(sample).key
    except (OSError, ValueError) as error:
        return {**row, "error": str(error)}
    row["key"] = key
    if (record := job.ledger.answer(key)) is None:
        failure = job.ledger.failure(key)
        return failure and {**row, "error": failure["error"]}
    answer = job.task.read(record["text"])
    dropped = dropped_by(
        job.task, Reply(record["text"], record["finish_reason"], record["refusal"], answer), sample, skip_filters
    )
    return {
        **row,
        "answer": answer,
        "status": "filtered" if dropped else "ok",
        "filter": dropped,
        "usage": record["usage"],
        "raw": record["text"],
    }


def dropped_by(task: Task, reply: Reply, sample: Mapping, skip_filters: Iterable[str] = ()) -> str | None:
    """Name of the first filter that drops a reply, None where it is kept."""
    return next((name for name, drops in task.filters if name not in skip_filters and drops(reply, sample)), None)


def kept(samples: Iterable[Mapping], out: Path, name: str) -> Iterator[dict]:
    """Samples whose answer was kept, with the answer as field `name` ("reasoning", "expression"): the next stage's input.

    samples: those that `out` was made from, in the same order.
    """
    rows = iter(JsonlSamples(out))
    row = next(rows, None)
    for sample in samples:
        if row is None or row["sample_id"] != sample["sample_id"]:
            continue  # not asked yet
        if row["status"] == "ok":
            yield {**sample, name: row["answer"]}
        row = next(rows, None)
    if row is not None:
        raise CurationError(f"{out} was made from other samples: {row['sample_id']!r} is not among these, or elsewhere")


def estimate(
    task: Task,
    samples: Iterable[Mapping],
    teacher: Teacher,
    *,
    ledger: Path,
    root: Path,
    limit: int | None = None,
    batch: bool = False,
) -> Estimate:
    """What `run_task` would ask and cost; asks nothing, needs no key."""
    chosen = _First(samples, limit)
    count_checked(task, chosen)
    with Ledger(ledger) if ledger.exists() else nullcontext() as book:
        job = _Job(
            task, chosen, teacher, book, root, "", None, 0, 0, Report(task.name, teacher.model), tqdm(disable=True)
        )
        mean = book and book.mean_usage(task.name, teacher.model)
        requests = prompt = at_most = 0
        for sample in chosen:
            try:
                if book and book.answer(job.request(sample).key):
                    continue
            except (OSError, ValueError):
                continue  # a sample without a picture is not asked
            requests += 1
            prompt += prompt_tokens(task, sample)
            at_most += job.at_most_usd(sample, batch=batch)
    completion = requests * task.reply_tokens
    if mean:
        prompt, completion = round(requests * mean[0]), round(requests * mean[1])
    basis = (
        "mean of the ledger's answers"
        if mean
        else "picture tiles as gpt-4.1 counts them, 4 characters a token, typical answer length"
    )
    if teacher.price_per_mtok is None:
        basis += "; NO PRICE KNOWN"
    return Estimate(
        requests, prompt, completion, cost_usd(prompt, completion, teacher.price_per_mtok, batch=batch), at_most, basis
    )
