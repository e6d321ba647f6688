"""How much the wording of the prompt matters: one model under each named prompt of its family.

    python -m egm_lib.pipeline.prompt_ablation --profile paper-qwen3vl-8b [--model small-base]

The model answers the evaluation splits under the profile's own prompt, as it does in the run
itself, and under each other prompt, as `small-base@prompt-authors-eval`. prompts.md compares them.
A prompt that the model cannot be asked with, or that repeats another one, is left out, and the
table says why. Finished answers are not asked for again.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.data import eval_splits, read_eval
from egm_lib.files import write_jsonl
from egm_lib.inference.from_profile import model_of
from egm_lib.inference.loading import load_processor
from egm_lib.pipeline.jobs import prediction_jobs, run_jobs
from egm_lib.profile import PROMPTED, Model, generation_of
from egm_lib.prompts import FAMILIES, Family
from egm_lib.reports.tables import build_tables
from egm_lib.run import Run

SHOWN_WORDS = 3  # of those that a tokenizer does not know


def named_prompts(run: Run, model: str, task: str) -> list[dict]:
    """A row for each named prompt of the model's family, the profile's own first.

    answers: the name that the model's answers have under this prompt. not_asked: why it is not
    asked with it, or None.
    """
    checkpoint, own = model_of(run, model, task), run.profile.evaluation.prompt
    family, tokenizer = FAMILIES[checkpoint.family], _tokenizer(run, checkpoint)
    [sample] = read_eval(run.profile.data.path, *eval_splits(task)[0], 1)
    rows, texts = [], {}
    for name in [own, *(name for name in family.prompts if name != own)]:
        reason = None
        if name != own:
            reason = why_not_asked(family, task, name, texts, sample["expression"], tokenizer)
        if reason is None:
            texts[family.prompts[name][task]] = name
        answers = model if name == own else f"{model}@{PROMPTED}{name}"
        rows.append(
            {
                "model": model,
                "task": task,
                "prompt": name,
                "answers": answers,
                "not_asked": reason,
            }
        )
    return rows


def why_not_asked(
    family: Family,
    task: str,
    name: str,
    asked: Mapping[str, str],
    expression: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str | None:
    """Why a model is not asked with a named prompt; None if it is.

    asked: the prompts that it is asked with already, text to name. expression: one of the samples'.
    tokenizer: None where a server has it.
    """
    text = family.prompts[name].get(task)
    if text is None:
        return f"{family.name} has none for the task {task}"
    if text in asked:
        return f"the same text as {asked[text]}"
    if tokenizer is None:
        return None
    of_sample = set(unknown_words(tokenizer, expression))
    prompt = family.prompt(expression, task, name=name)
    unknown = [word for word in unknown_words(tokenizer, prompt) if word not in of_sample]
    if not unknown:
        return None
    shown, more = unknown[:SHOWN_WORDS], len(unknown) - SHOWN_WORDS
    words = ", ".join(map(repr, shown)) + (f" and {more} more" if more > 0 else "")
    return f"the model's tokenizer does not know {words}"


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text that become the unknown token, each once."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    words = [
        text[start:end].strip() for token, (start, end) in pairs if token == tokenizer.unk_token_id
    ]
    return list(dict.fromkeys(words))


def _tokenizer(run: Run, model: Model) -> PreTrainedTokenizerBase | None:
    if generation_of(run.profile, model).engine == "openai":
        return None
    return load_processor(model.location, model.family, revision=model.revision).tokenizer


def run_all(run: Run, model: str) -> None:
    """Has the model answer under every prompt that it can be asked with, and writes the table."""
    rows = [row for task in run.profile.tasks for row in named_prompts(run, model, task)]
    for task in run.profile.tasks:
        asked = [row["answers"] for row in rows if row["task"] == task and row["not_asked"] is None]
        run_jobs(run, prediction_jobs(run, asked, "--task", task))
    write_jsonl(run.prompts(model), rows)
    evaluation = run.profile.evaluation
    build_tables(
        run.roots,
        run.figures,
        rule=evaluation.rule,
        draws=evaluation.bootstrap_samples,
        only=["prompts"],
    )
    print((run.figures / "prompts.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.prompt_ablation", __doc__.split("\n")[0])
    parser.add_argument("--model", default="small-base", help="default: %(default)s")
    args = parser.parse_args(argv)
    if "@" in args.model:
        parser.error(f"--model {args.model}: name a model without @")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    return ends(lambda: _work(args))


def _work(args: argparse.Namespace) -> None:
    run_all(run_of(args), args.model)


if __name__ == "__main__":
    sys.exit(main())
