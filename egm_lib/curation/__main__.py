"""python -m egm_lib.curation TASK --input samples.jsonl --output OUT.jsonl --base-url URL --model
NAME

Exit code: 0 all answered or filtered; 2 the run could not start or go on; 3 some samples failed for
good (they are listed, the rest is kept); 4 stopped before all were asked (budget, Ctrl-C). The same
command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from egm_lib.curation.client import estimate, run_task
from egm_lib.curation.ledger import LedgerError
from egm_lib.curation.outputs import JsonlSamples
from egm_lib.curation.services import CurationError
from egm_lib.curation.tasks import TASKS
from egm_lib.profile import Price, Teacher

# USD per million tokens, list prices as remembered in 2025: check the service's page, or say
# --price.
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
    task = TASKS[args.task]
    price = (
        Price(prompt=args.price[0], completion=args.price[1])
        if args.price
        else LIST_PRICES.get(args.model)
    )
    if price is None:
        price = DEAREST
        print(
            f"price of {args.model!r} unknown, counted as {price.prompt:g} + {price.completion:g} "
            "USD per million "
            "tokens; say it with --price PROMPT COMPLETION (0 0 for a server of your own)",
            file=sys.stderr,
        )
    teacher = Teacher(
        base_url=args.base_url,
        model=args.model,
        concurrency=args.concurrency,
        price_per_mtok=price,
        temperature=task.temperature if args.temperature is None else args.temperature,
        max_tokens=args.max_tokens or task.max_tokens,
        api_key_env=args.api_key_env,
    )
    ledger = args.ledger or args.output.with_suffix(".ledger.jsonl")
    try:
        if args.input.resolve() in (args.output.resolve(), ledger.resolve()):
            raise CurationError(
                f"{args.input} is the input: it would be overwritten; name another output and "
                "ledger"
            )
        samples = JsonlSamples(args.input)
        root = args.root or _find_root(samples)
        if args.dry_run:
            print(
                estimate(
                    task,
                    samples,
                    teacher,
                    ledger=ledger,
                    root=root,
                    limit=args.limit,
                    batch=args.batch,
                )
            )
            return 0
        report = run_task(
            task,
            samples,
            teacher,
            out=args.output,
            ledger=ledger,
            root=root,
            limit=args.limit,
            budget_usd=args.budget,
            skip_filters=args.skip_filter,
            batch=args.batch,
            timeout_s=args.timeout,
            max_retries=args.max_retries,
        )
    except (CurationError, LedgerError, OSError) as error:
        print(f"curation: {error}", file=sys.stderr)
        return 2
    print(report)
    return 3 if report.failed else 4 if report.waiting else 0


def _find_root(samples: JsonlSamples) -> Path:
    """The folder, upwards from the input file's, in which the first sample's image lies."""
    folder = samples.path.resolve().parent
    image = str(next(iter(samples), {}).get("image", ""))
    return next(
        (parent for parent in (folder, *folder.parents) if (parent / image).is_file()), folder
    )


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
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
        help="data root; default: upwards from the input, where the first image is found",
    )
    parser.add_argument("--ledger", type=Path, help="default: OUTPUT with suffix .ledger.jsonl")
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key",
    )
    parser.add_argument("--concurrency", type=positive, default=16)
    parser.add_argument("--limit", type=positive, help="only the first so many samples")
    parser.add_argument(
        "--budget", type=float, metavar="USD", help="stop before this ledger has cost more"
    )
    parser.add_argument(
        "--price",
        type=float,
        nargs=2,
        metavar=("PROMPT", "COMPLETION"),
        help="USD per million tokens",
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max-tokens", type=positive)
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="without a byte from the service",
    )
    parser.add_argument("--max-retries", type=int, default=12)
    parser.add_argument("--skip-filter", action="append", default=[], metavar="NAME")
    parser.add_argument(
        "--batch", action="store_true", help="OpenAI's Batch API: half the price, within a day"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would cost; ask nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
