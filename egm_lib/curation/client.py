"""One asynchronous client for every service: concurrency, retries, a budget, a ledger."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import quote

import httpx2
import openai
from tqdm import tqdm

from egm_lib.curation.batch import BatchLog, run_batches
from egm_lib.curation.cost import CostEstimate, SpendingCap, cost_usd
from egm_lib.curation.ledger import Ledger, LedgerError
from egm_lib.curation.options import CurationError, Refused
from egm_lib.curation.outputs import First, count_checked, write_output
from egm_lib.curation.request_plan import CurationRequest, Plan, Receipts, Report
from egm_lib.curation.services import connect, refuses_everything, words_of
from egm_lib.curation.tasks import TASKS, CurationTask
from egm_lib.profile import MINI, Teacher, api_key

READ_TRIES = 3  # a reply that is no answer (half a JSON, an error page) is asked for again
LEARN_TRIES = 16  # refusals that a request may learn from; no service refuses so many options
SYNC_S = 5.0


def run_task(
    task: CurationTask,
    samples: Iterable[Mapping],
    teacher: Teacher,
    *,
    out: Path,
    ledger: Path,
    root: Path,
    limit: int | None = None,
    budget_usd: float | None = None,
    skip_filters: Iterable[str] = (),
    batch: bool = False,
    timeout_s: float = 120.0,
    max_retries: int = 12,
    progress: bool = True,
) -> Report:
    """Ask a service about every sample that the ledger does not answer yet; filter; write `out`.

    samples: a list, a Dataset or JsonlSamples, since they are iterated several times. root: the
    folder that their `image` is relative to. limit: the first so many samples.
    out: one row per sample, in their order: {sample_id, answer, status, filter, error, usage, raw,
    task, model, key}. status is "ok", "filtered" (filter says why) or "failed" (error says why). A
    sample that was not asked yet has no row.
    budget_usd: cap on all that this ledger has paid and will pay. The key comes from the
    environment variable that the teacher names.
    Ctrl-C waits for the requests under way; the same call then continues. Runs in notebooks too.
    Raises CurationError, LedgerError or ProfileError; answers that were paid stay in the ledger.
    """
    names = {name for some in TASKS.values() for name, _ in some.filters}
    if unknown := set(skip_filters) - names:
        raise CurationError(
            f"there is no filter {min(unknown)!r}; known: {', '.join(sorted(names))}"
        )
    if budget_usd is not None and teacher.price_per_mtok is None:
        raise CurationError(
            f"a budget needs the price of {teacher.model}: set its price_per_mtok in the profile"
        )
    if batch and teacher.base_url == MINI:
        raise CurationError(
            "the miniature world's teacher does not support batches; leave --batch out"
        )
    if Path(out).is_dir():
        raise CurationError(f"cannot write the output to {out}: it is a folder")
    if Path(out).resolve() == Path(ledger).resolve():
        raise CurationError(
            f"cannot write the output to {out}: it is the ledger; name another file"
        )
    if not batch and (left := BatchLog(Path(ledger)).open_batches()):
        raise CurationError(
            f"{len(left)} batches with {sum(len(each.requests) for each in left):,} requests of "
            f"{ledger} are still on the service; run again with --batch to collect them"
        )
    key = api_key(teacher.base_url, teacher.api_key_env)
    plan = Plan(task, First(samples, limit), teacher, Path(root))
    total = count_checked(task, plan.samples)
    report = Report(task.name, teacher.model, out=Path(out))
    refused, started = None, time.monotonic()
    with Ledger(ledger) as book, _progress(task.name, total, progress) as bar:
        receipts = Receipts(plan, book, report, key, batch=batch)
        stop = threading.Event()
        client = connect(
            teacher.base_url, key, root=plan.root, timeout_s=timeout_s, max_retries=max_retries
        )
        if batch:
            work = run_batches(client, plan, receipts, budget_usd, stop, bar)
        else:
            deadline_s = (max_retries + 1) * (timeout_s + 60)  # of a sample, with all retries
            work = _Asker(client, plan, receipts, budget_usd, stop, bar, deadline_s).run()
        try:
            _run_anywhere(work, stop)
        except Refused as error:
            refused = error
        report.wall_s = time.monotonic() - started
        report.notes += plan.options.notes
        write_output(plan, book, out, frozenset(skip_filters), report)
    if refused:
        raise refused
    return report


def _progress(name: str, total: int, shown: bool) -> tqdm:
    interval_s = 1.0 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=name, unit="sample", disable=not shown, mininterval=interval_s)


class _Asker:
    """Workers that take samples from one iterator, each with one request under way."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        plan: Plan,
        receipts: Receipts,
        budget_usd: float | None,
        stop: threading.Event,
        bar: tqdm,
        deadline_s: float,
    ) -> None:
        self.client, self.plan, self.receipts = client, plan, receipts
        self.stop, self.bar, self.deadline_s = stop, bar, deadline_s
        self.budget = SpendingCap(budget_usd, receipts.ledger)
        self.patience = max(100, 4 * plan.teacher.concurrency)  # failures in a row
        self.failures_in_a_row = 0
        self.under_way: set[str] = set()
        self.error: Exception | None = None

    async def run(self) -> None:
        """Ask about all pending samples.

        Raises Refused or LedgerError, after the requests under way have ended.
        """
        pending = self.plan.pending(self.receipts.ledger, self.under_way)
        async with self.client, asyncio.TaskGroup() as tasks:
            syncing = tasks.create_task(self._sync())
            await asyncio.gather(
                *(self._work(pending) for _ in range(self.plan.teacher.concurrency))
            )
            syncing.cancel()
        if self.error:
            raise self.error

    async def _work(self, pending: Iterator[CurationRequest | None]) -> None:
        passed = 0
        while not self.stop.is_set() and (request := next(pending, self)) is not self:
            if request is None:
                passed += 1
                self.bar.update()
                if passed % 64 == 0:
                    await asyncio.sleep(0)  # lets replies in
                continue
            try:
                await self._ask(request)
            except (Refused, LedgerError) as error:
                self.error = self.error or error
                self.stop.set()
            self.under_way.discard(request.key)
            self.bar.update()
            self.bar.set_postfix_str(f"{self.receipts.ledger.cost_usd:.4f} USD", refresh=False)

    async def _ask(self, request: CurationRequest) -> None:
        """Asks about one sample until the ledger holds a record of it."""
        try:
            body = await asyncio.to_thread(self.plan.body, request)
        except (OSError, ValueError) as error:
            self.receipts.fail(request, str(error))
            return
        at_most_usd = self.plan.at_most_usd(request)
        for attempt in range(READ_TRIES):
            # Every reply is paid, so every try needs room in the budget
            if not await self.budget.take_patiently(at_most_usd, self.stop):
                if not self.stop.is_set():
                    self._end(self.budget.used_up)
                return
            self.receipts.report.asked += attempt == 0
            try:
                async with asyncio.timeout(self.deadline_s):
                    fault = await self._fetch(request, body)
            except (openai.OpenAIError, TimeoutError) as error:
                if reason := refuses_everything(error):
                    raise Refused(self.receipts.redact(reason)) from None
                fault = words_of(error)
                break
            finally:
                await self.budget.give_back(at_most_usd)
            if fault is None:
                self.failures_in_a_row = 0
                return
            await asyncio.sleep(2.0**attempt)
        else:
            fault = f"{READ_TRIES} replies were no answers; of the last one, {fault}"
        self.receipts.fail(request, fault)
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= self.patience:
            self._end(
                f"{self.patience} requests in a row failed; run again when the service is well"
            )

    async def _fetch(self, request: CurationRequest, body: dict) -> str | None:
        """Ask once, and put the reply into the ledger; returns why it is no answer.

        Raises openai.OpenAIError.
        """
        started = time.monotonic()
        response = await self._post(request, body)
        # Paid from here on: nothing may wait or fail before it is in the ledger.
        latency_ms = round(1000 * (time.monotonic() - started), 1)
        return self.receipts.receive(request, response.text, latency_ms=latency_ms)

    async def _post(self, request: CurationRequest, body: dict) -> httpx2.Response:
        """Send a request; one that the service refuses for an option is sent as it accepts it."""
        name = quote(request.sample_id, safe=" :/+,=@#", errors="replace")
        headers = {"headers": {"X-EGM-Sample": name, "X-EGM-Task": self.plan.task.name}}
        for attempt in range(LEARN_TRIES):
            sent = self.plan.options.sent
            try:
                # The SDK's retries without its typed request and answer, which cost more time than
                # the connection does.
                return await self.client.post(
                    "/chat/completions", cast_to=httpx2.Response, body=body | sent, options=headers
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                message = f"{error.param or ''} {words_of(error)}"
                if attempt + 1 == LEARN_TRIES or not self.plan.options.learn(message, sent):
                    raise
        raise AssertionError("the last try returns or raises")

    def _end(self, reason: str) -> None:
        self.receipts.report.stopped = self.receipts.report.stopped or reason
        self.stop.set()

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self.receipts.ledger.sync)


def _run_anywhere(work: Coroutine, stop: threading.Event) -> None:
    """asyncio.run, in a thread of its own where a loop runs already, as in notebooks.

    Ctrl-C sets `stop`; a second one raises KeyboardInterrupt.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with _stopping_gently(stop):
            asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, work)
        try:
            future.result()
        except KeyboardInterrupt:
            stop.set()
            future.result()


@contextmanager
def _stopping_gently(stop: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(*_: object) -> None:
        stop.set()
        restore()
        print(
            "\nstopping when the requests under way have ended; press Ctrl-C again to drop them",
            file=sys.stderr,
        )

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore()


def estimate(
    task: CurationTask,
    samples: Iterable[Mapping],
    teacher: Teacher,
    *,
    ledger: Path,
    root: Path,
    limit: int | None = None,
    batch: bool = False,
) -> CostEstimate:
    """What `run_task` would ask and cost; asks nothing, needs no key."""
    plan = Plan(task, First(samples, limit), teacher, Path(root))
    count_checked(task, plan.samples)
    requests = prompt = at_most_usd = 0
    with Ledger(ledger) if Path(ledger).exists() else nullcontext() as book:
        mean = book and book.mean_usage(task.name, teacher.model)
        for request in plan.pending(book, set()) if book else map(plan.keyless, plan.samples):
            if request is None:
                continue
            requests += 1
            prompt += request.prompt_tokens
            at_most_usd += plan.at_most_usd(request, batch=batch)
    completion = requests * task.reply_tokens
    basis = "image tiles as gpt-4.1 counts them, 4 characters a token, a typical answer's length"
    if mean:
        prompt, completion = round(requests * mean[0]), round(requests * mean[1])
        basis = "the mean of the ledger's answers"
    cost = cost_usd(prompt, completion, teacher.price_per_mtok, batch=batch)
    return CostEstimate(
        requests, prompt, completion, cost, at_most_usd, basis, teacher.price_per_mtok
    )
