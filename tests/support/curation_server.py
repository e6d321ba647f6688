"""A local OpenAI-compatible server that misbehaves by seed, for tests and benchmarks of curation.

`python tests/support/curation_server.py --log paid.log` prints its port. Every answer that it made,
and would charge for, is a line "<sample_id> <kind>" in the log, written before the answer is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Share of the requests at --misbehave 1. The others are answered well.
KINDS = {
    "429-retry-after": 0.05,
    "429": 0.03,
    "500": 0.04,
    "drop": 0.03,  # the connection is closed without a word
    "drop-half": 0.02,  # ... in the middle of a paid answer
    "stall": 0.01,  # nothing is sent for a minute
    "half-json": 0.03,  # a whole HTTP answer with half a JSON
    "empty": 0.02,
    "refusal": 0.02,
    "pause": 0.02,  # answered well after five seconds
}
BURST = 400  # after the first hundred requests, the first BURST_429 of every BURST get 429
BURST_429 = 40
PAID = {"well", "drop-half", "half-json", "empty", "refusal", "pause"}


def reply_text(sample_id: str) -> str:
    """The well-behaved answer to a sample: always the same."""
    return (
        f"it is the {hashlib.sha256(sample_id.encode()).hexdigest()[:6]} one, left of the others."
    )


class Server:
    def __init__(self, seed: int, misbehave: float, delay_s: float, log: str | None) -> None:
        self.seed, self.misbehave, self.delay_s = seed, misbehave, delay_s
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self.attempts: Counter[str] = Counter()
        self.requests = 0

    def kind(self, sample_id: str) -> str:
        """What happens to this attempt, by seed, sample, number of the attempt, and bursts."""
        self.attempts[sample_id] += 1
        self.requests += 1
        if self.misbehave and self.requests > 100 and self.requests % BURST < BURST_429:
            return "429-retry-after" if self.requests % 2 else "429"
        what = f"{self.seed} {sample_id} {self.attempts[sample_id]}"
        draw = int(hashlib.sha256(what.encode()).hexdigest()[:12], 16) / 16**12
        for kind, share in KINDS.items():
            if draw < share * self.misbehave:
                return kind
            draw -= share * self.misbehave
        return "well"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to end."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:])
        }
        await reader.readexactly(int(headers.get("content-length", 0)))
        sample_id = headers.get("x-egm-sample", "")
        kind = self.kind(sample_id)
        if kind in PAID and self.log is not None:
            os.write(self.log, f"{sample_id} {kind}\n".encode())
        await asyncio.sleep({"pause": 5.0, "stall": 60.0}.get(kind, self.delay_s))
        if kind in ("drop", "stall"):
            return False
        status, extra, body = 200, "", self.completion(sample_id, kind)
        if kind.startswith("429"):
            status, extra = 429, "Retry-After: 1\r\n" if kind == "429-retry-after" else ""
            body = b'{"error": {"message": "slow down"}}'
        elif kind == "500":
            status, body = 500, b'{"error": {"message": "internal"}}'
        elif kind == "half-json":
            body = body[: len(body) // 2]
        start = (
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{extra}\r\n"
        )
        writer.write(start.encode() + (body[: len(body) // 2] if kind == "drop-half" else body))
        await writer.drain()
        return kind != "drop-half"

    def completion(self, sample_id: str, kind: str) -> bytes:
        text = {"empty": "", "refusal": "I'm sorry, but I can't help with that."}.get(
            kind, reply_text(sample_id)
        )
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 500, "completion_tokens": 20, "total_tokens": 520}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return json.dumps(
            {
                "id": f"r-{sample_id}",
                "object": "chat.completion",
                "choices": [choice],
                "usage": usage,
            }
        ).encode()


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A server in a process of its own, for a with-block; gives its base URL."""
    command = [sys.executable, str(Path(__file__)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--misbehave", type=float, default=0.0)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--log")
    args = parser.parse_args()
    server = Server(args.seed, args.misbehave, args.delay_ms / 1000, args.log)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
