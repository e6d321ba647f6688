"""Ask a service about the samples of a file:

  python -m egm_lib.curation TASK --input samples.jsonl --output OUT.jsonl --base-url URL --model M

Exit status: 0 if all samples are answered; 2 if the run could not start or continue; 3 if some
samples failed (they are listed, the others are kept); 4 if it stopped before all were asked
(budget, Ctrl-C). The same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from egm_lib.cli import ends
from egm_lib.curation.client import estimate, run_task
from egm_lib.curation.options import CurationError
from egm_lib.curation.outputs import JsonlSamples
from egm_lib.curation.tasks import TASKS
from egm_lib.profile import Price, Teacher

# USD per million tokens. List prices of 2025 from memory: check them, or give --price.
LIST_PRICES = {
    "gpt-4.1": Price(prompt=2.0, completion=8.0),
    "gpt-4.1-mini": Price(prompt=0.4, completion=1.6),
    "gpt-5": Price(prompt=1.25, completion=10.0),
    "gemini-2.5-flash": Price(prompt=0.3, completion=2.5),
    "gemini-2.5-pro": Price(prompt=1.25, completion=10.0),
    "gemini-3-pro-preview": Price(prompt=2.0, completion=12.0),
}
DEAREST = Price(prompt=2.0, completion=12.0)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    return ends(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    task = TASKS[args.task]
    temperature = task.temperature if args.temperature is None else args.temperature
    teacher = Teacher(
        base_url=args.base_url,
        model=args.model,
        concurrency=args.concurrency,
        price_per_mtok=_price(args),
        temperature=temperature,
        max_tokens=args.max_tokens or task.max_tokens,
        api_key_env=args.api_key_env,
        extra_body=args.extra_body,
    )
    ledger = args.ledger or args.output.with_suffix(".ledger.jsonl")
    if args.input.resolve() in (args.output.resolve(), ledger.resolve()):
        raise CurationError(
            f"{args.input} is the input: it would be overwritten; name another output and ledger"
        )
    samples = JsonlSamples(args.input)
    asked = {
        "ledger": ledger,
        "root": args.root or _find_root(samples),
        "limit": args.limit,
        "batch": args.batch,
    }
    if args.dry_run:
        print(estimate(task, samples, teacher, **asked))
        return 0
    report = run_task(
        task,
        samples,
        teacher,
        out=args.output,
        budget_usd=args.budget,
        skip_filters=args.skip_filter,
        timeout_s=args.timeout,
        max_retries=args.max_retries,
        **asked,
    )
    print(report)
    if report.failed:
        return 3
    return 4 if report.waiting else 0


def _price(args: argparse.Namespace) -> Price:
    if args.price:
        return Price(prompt=args.price[0], completion=args.price[1])
    if args.model in LIST_PRICES:
        return LIST_PRICES[args.model]
    print(
        f"the price of {args.model!r} is unknown and counted as {DEAREST.prompt:g} + "
        f"{DEAREST.completion:g} USD per million tokens; give it with --price PROMPT COMPLETION "
        "(0 0 for a server of your own)",
        file=sys.stderr,
    )
    return DEAREST


def _find_root(samples: JsonlSamples) -> Path:
    """The nearest folder, from the input file's upwards, that holds the first sample's image."""
    folder = samples.path.resolve().parent
    image = str(next(iter(samples), {}).get("image", ""))
    return next(
        (parent for parent in (folder, *folder.parents) if (parent / image).is_file()), folder
    )


def _fields(text: str) -> dict:
    """A JSON object given on the command line."""
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return fields


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1: give at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.curation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--input", type=Path, required=True, help="samples (failure: prediction rows) as JSONL"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--base-url",
        required=True,
        help='of any OpenAI-compatible service; "mini" for the miniature world\'s teacher',
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--root",
        type=Path,
        help="data root; default: the nearest folder, upwards, that holds the first image",
    )
    parser.add_argument("--ledger", type=Path, help="default: OUTPUT with suffix .ledger.jsonl")
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key",
    )
    parser.add_argument("--concurrency", type=positive, default=16)
    parser.add_argument("--limit", type=positive, help="only this many samples, from the first")
    parser.add_argument(
        "--budget", type=float, metavar="USD", help="most that this ledger may cost"
    )
    parser.add_argument(
        "--price",
        type=float,
        nargs=2,
        metavar=("PROMPT", "COMPLETION"),
        help="USD per million tokens",
    )
    parser.add_argument("--temperature", type=float, help="verify is asked at 0 in any case")
    parser.add_argument("--max-tokens", type=positive)
    parser.add_argument(
        "--extra-body",
        type=_fields,
        default={},
        metavar="JSON",
        help="more fields of every request, such as '{\"top_p\": 0.9}'",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="longest silence of the service",
    )
    parser.add_argument("--max-retries", type=int, default=12)
    parser.add_argument("--skip-filter", action="append", default=[], metavar="NAME")
    parser.add_argument(
        "--batch", action="store_true", help="OpenAI's Batch API: half the price, within a day"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the estimated cost; ask nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
