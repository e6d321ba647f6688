"""The two SFT trainers: TRL's, and one that reads each image once a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from trl import SFTTrainer

from egm_lib.data import open_image
from egm_lib.inference.shared_prefix import Reader
from egm_lib.training.clock import Clock, TimedSchedule
from egm_lib.training.model_setup import TrainingError, chat_text
from egm_lib.training.prefix_logps import suffix_logps


class ImageSampler(Sampler[int]):
    """Rows in random order, in which up to `together` rows of one image follow each other."""

    def __init__(self, images: list[str], together: int, seed: int):
        self.together, self.seed, self.epoch, self.size = together, seed, 0, len(images)
        codes_N = np.unique(np.asarray(images), return_inverse=True)[1]
        self.rows_by_image = np.split(
            np.argsort(codes_N, kind="stable"), np.cumsum(np.bincount(codes_N))[:-1]
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        chunks = []
        for rows in self.rows_by_image:
            rows = random.permutation(rows)
            chunks += [
                rows[start : start + self.together] for start in range(0, len(rows), self.together)
            ]
        for index in random.permutation(len(chunks)):
            yield from chunks[index].tolist()


def answer_ids(row: Mapping, tokenizer, asked: int, max_length: int | None) -> list[int]:
    """Tokens of a row's answer, end token included, cut so that the row fits into max_length.

    asked: number of tokens of image and question. Raises TrainingError if they alone fill
    max_length.
    """
    ids = [
        *tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    if max_length is None:
        return ids
    if asked >= max_length:
        raise TrainingError(
            f"{row['image']}: image and question take {asked} tokens, but sft.max_length is "
            f"{max_length}: raise it, or lower sft.max_pixels."
        )
    return ids[: max_length - asked]


class SharedPrefixCollator:
    """Rows -> one batch: a prefix for each image, and each row's question and answer as suffix."""

    def __init__(self, reader: Reader, processor, max_length: int | None):
        self.reader, self.processor, self.max_length = reader, processor, max_length

    def __call__(self, rows: list[dict]) -> dict:
        prefixes: dict[str, int] = {}
        prompts, group, suffixes, labels = [], [], [], []
        for row in rows:
            prompt = self.reader.prompt(
                Path(row["image"]), chat_text(self.processor, row["prompt"])
            )
            if row["image"] not in prefixes:
                prefixes[row["image"]] = len(prompts)
                prompts.append(prompt.upto_image())
            group.append(prefixes[row["image"]])
            question = prompt.ids[prompt.image_end :]
            answer = answer_ids(row, self.processor.tokenizer, len(prompt.ids), self.max_length)
            suffixes.append(torch.tensor([*question, *answer]))
            labels.append(torch.tensor([-100] * len(question) + answer))
        attend = [torch.ones_like(suffix) for suffix in suffixes]
        return {
            "prefixes": prompts,
            "group": torch.tensor(group),
            "suffix": pad_sequence(suffixes, batch_first=True),
            "attend": pad_sequence(attend, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class PlainCollator:
    """Rows -> one batch for any model: image, question and answer, padded on the right."""

    def __init__(self, processor, max_length: int | None):
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: list[dict]) -> dict:
        encoded, ids, labels, kinds = [], [], [], []
        for row in rows:
            text = chat_text(self.processor, row["prompt"])
            inputs = self.processor(
                images=[open_image(row["image"])], text=[text], return_tensors="pt"
            )
            question = inputs.pop("input_ids")[0].tolist()
            answer = answer_ids(row, self.processor.tokenizer, len(question), self.max_length)
            ids.append(torch.tensor([*question, *answer]))
            labels.append(torch.tensor([-100] * len(question) + answer))
            if "mm_token_type_ids" in inputs:
                kinds.append(
                    torch.tensor(inputs.pop("mm_token_type_ids")[0].tolist() + [0] * len(answer))
                )
            inputs.pop("attention_mask")
            encoded.append(inputs)
        batch = {key: torch.cat([inputs[key] for inputs in encoded]) for key in encoded[0]}
        batch |= {"mm_token_type_ids": pad_sequence(kinds, batch_first=True)} if kinds else {}
        return batch | {
            "input_ids": pad_sequence(
                ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id
            ),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class SharedPrefixSFT(TimedSchedule, SFTTrainer):
    """SFTTrainer on SharedPrefixCollator's batches: the same loss, each image read once a batch."""

    def __init__(self, *args, reader: Reader, clock: Clock, together: int, **kwargs):
        self.reader, self.clock, self.together = reader, clock, together
        super().__init__(*args, callbacks=[clock], **kwargs)
        # The loss is over the tokens of all accumulation steps
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> ImageSampler:
        return ImageSampler(
            list((train_dataset or self.train_dataset)["image"]), self.together, self.args.seed
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        features = self.reader.features([prefix.image for prefix in inputs["prefixes"]])
        base = self.accelerator.unwrap_model(model)
        keep = inputs["labels"] != -100
        with self.accelerator.autocast():
            logps, _ = suffix_logps(
                getattr(base, "get_base_model", lambda: base)(),
                inputs["prefixes"],
                features,
                inputs["group"],
                inputs["suffix"],
                inputs["attend"],
                keep,
            )
        lengths = torch.tensor([len(prefix.ids) for prefix in inputs["prefixes"]])
        read = int(lengths[inputs["group"].cpu()].sum() + inputs["attend"].sum())
        self.state.num_input_tokens_seen += read  # as many tokens as a plain forward reads
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        self._metrics["train"]["tokens"].append(float(keep.sum()))
        self._metrics["train"]["rows"].append(float(len(keep)))
        return -logps.sum() / (keep.sum() if num_items_in_batch is None else num_items_in_batch)


class PlainSFT(TimedSchedule, SFTTrainer):
    """TRL's SFTTrainer with our clock, on PlainCollator's batches."""

    def __init__(self, *args, clock: Clock, **kwargs):
        self.clock = clock
        super().__init__(*args, callbacks=[clock], **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        before = self._total_train_tokens
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL counts from zero after an interruption; the trainer's state is in the checkpoint
        self.state.num_input_tokens_seen += self._total_train_tokens - before
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        return result
