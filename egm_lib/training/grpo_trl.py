"""GRPO with TRL's rollouts and loss, and with what vision models need under vLLM."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.nn.functional import pad
from trl.generation import vllm_generation
from trl.trainer.utils import (
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from egm_lib.data import open_image
from egm_lib.inference.vllm_engine import vllm_images
from egm_lib.training.grpo_trainer import TimedGRPO, answer_texts
from egm_lib.training.micro_batches import (
    by_group,
    by_length,
    micro_batches,
    packed_row_counts,
    row_counts,
    row_lengths,
)
from egm_lib.training.model_setup import TrainingError
from egm_lib.training.packed_groups import packed_logps, use_packed_attention
from egm_lib.training.packing_check import check_packing
from egm_lib.training.step_images import processed_once


def collapse_image_tokens(
    ids: Sequence[int], image_token: int, ends: Collection[int] = ()
) -> list[int]:
    """Token ids with one image token in place of each run of them.

    vLLM in this process expands image tokens itself, and would see a longer prompt.
    ends: tokens that vLLM also puts before and after an image (InternVL-3); they are removed.
    """
    runs = ((token, len(list(run))) for token, run in itertools.groupby(ids) if token not in ends)
    return [token for token, length in runs for _ in range(1 if token == image_token else length)]


def check_same_prompts(trainer: Sequence[Sequence[int]], sampler: Sequence[Sequence[int]]) -> None:
    """Raises TrainingError if the sampler has read other tokens than the trainer.

    The model would then be trained on answers to other prompts.
    """
    for ours, theirs in zip(trainer, sampler, strict=True):
        if list(ours) != list(theirs):
            raise TrainingError(
                f"the sampler read a prompt of {len(theirs)} tokens, and the trainer has "
                f"{len(ours)}: the checkpoint's processor and vLLM expand an image into different "
                "tokens. Sample with transformers (grpo.rollout), or try another version of vLLM."
            )


@contextmanager
def vllm_options(**options: object) -> Iterator[None]:
    """Within this context, TRL starts vLLM with these options too; TRL has no setting for them."""
    plain = getattr(vllm_generation, "LLM", None)  # None: vLLM is not installed
    if plain is None:
        yield
        return
    vllm_generation.LLM = partial(plain, **options)
    try:
        yield
    finally:
        vllm_generation.LLM = plain


def reset_caches(llm) -> None:
    """Empties the caches of a vLLM in this process, which depend on the weights.

    These are the image features, and the keys and values of prompts. TRL empties only the latter.
    If vision is trained, old features of an image that occurs again make trainer and sampler differ
    by 0.15 nats. Raises TrainingError where the vLLM has no such call.
    """
    for name in ("reset_encoder_cache", "reset_prefix_cache"):
        # LLM has some of these methods, its engine the others
        owners = [
            owner for owner in (llm, getattr(llm, "llm_engine", None)) if hasattr(owner, name)
        ]
        if not owners:
            raise TrainingError(
                f"this vLLM has no {name}, and would keep what old weights made of "
                "images and prompts. Use vLLM 0.30."
            )
        getattr(owners[0], name)()


def reset_server_cache(client) -> None:
    """Empties the image features of a vLLM server, which depend on the weights as above.

    client: TRL's. Raises TrainingError where the server does not do it.
    """
    url = f"{client.base_url}/reset_encoder_cache"
    status = client.session.post(url).status_code
    if status != 200:
        raise TrainingError(
            f"{url} answered {status}, so the vLLM server would keep image features of old "
            "weights. Use vLLM 0.30, and start it as `trl vllm-serve` does."
        )


class PlainGRPO(TimedGRPO):
    """TRL's rollouts and loss, with what vLLM needs. A test shows that its loss equals ours.

    A step in which sampler and trainer are compared is sampled without top-p and top-k. Images are
    opened once a step. With micro_batch_tokens, the rows of an accumulation step go through the
    model in micro-batches of at most so many tokens. With pack_groups, the model reads the image
    and prompt of a group once, if the first step shows that log-probs and gradient are TRL's.
    """

    def __init__(
        self,
        *args,
        rollout_dtype: str,
        micro_batch_tokens: int | None = None,
        pack_groups: bool = False,
        **kwargs,
    ):
        self.micro_batch_tokens = micro_batch_tokens
        with vllm_options(dtype=rollout_dtype, **vllm_images(kwargs["processing_class"])):
            super().__init__(*args, **kwargs)
        # TRL's own way, until both have been compared on the first batch of this session
        self.packs, self.packing_unchecked = False, pack_groups and self._can_pack()
        if not self.use_vllm:
            return
        # Replaced on the instance, since TRL's `generate` calls it too after vLLM has slept
        self.vllm_generation.sync_weights = partial(self._sync, self.vllm_generation.sync_weights)
        if self.vllm_mode == "colocate":
            self.vllm_generation.generate = partial(
                self._generate_in_process, self.vllm_generation.generate
            )

    def _can_pack(self) -> bool:
        """Whether groups can be packed; says why not."""
        rows, size = self.args.per_device_train_batch_size, self.num_generations
        reason = None
        if rows % size:
            reason = (
                f"grpo.per_device_train_batch_size = {rows} is not a multiple of "
                f"grpo.num_generations = {size}, so groups would be divided"
            )
        elif not all(map(use_packed_attention, self._all_models())):
            reason = "the model's attention is not SDPA"
        if reason:
            print(f"Every completion reads its own prompt (grpo.shared_prefix): {reason}.")
        return reason is None

    def _all_models(self) -> list:
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        return [self._bare(model) for model in models]

    def _sync(self, sync_weights: Callable[[], None]) -> None:
        sync_weights()
        if self.vllm_mode == "colocate":
            reset_caches(self.vllm_generation.llm)
        elif self.accelerator.is_main_process:
            reset_server_cache(self.vllm_generation.vllm_client)

    def _generate(self, prompts):
        began = time.perf_counter()
        self._plan_check()
        if self.use_vllm and not self.checked and self.model.training:
            self.vllm_importance_sampling_correction = True  # TRL then computes our log-probs too
            with self._uncut_sampling():
                generated = super()._generate(prompts)
        else:
            generated = super()._generate(prompts)
        self._note_rollout(generated[1], time.perf_counter() - began)
        return generated

    @contextmanager
    def _uncut_sampling(self) -> Iterator[None]:
        """Within this context, vLLM samples without top-p and top-k.

        It states the log-probs of the distribution that it samples from. Those of a truncated
        distribution are not the trainer's.
        """
        sampler = self.vllm_generation
        cut = sampler.top_p, sampler.top_k
        sampler.top_p, sampler.top_k = 1.0, 0
        try:
            yield
        finally:
            sampler.top_p, sampler.top_k = cut

    def _prepare_inputs(self, generation_batch):
        """TRL's, but it leaves the rows of a group together where groups are packed.

        TRL shuffles the rows of a rollout before it divides them into accumulation steps. All of
        them belong to one update, so their order has no effect on it.
        """
        if not (self.packs or self.packing_unchecked) or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            parts = split_tensor_dict(split_pixel_values_by_grid(batch), steps)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % steps]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """As in TRL, but the `image` of a row is a file.

        The loader yields each row once for every accumulation step, but this method is called once
        a step. So images are opened here, and processed once.
        """
        images = {file: open_image(file) for file in {row["image"] for row in inputs}}
        rows = [{**row, "image": images[row["image"]]} for row in inputs]
        with processed_once(self.processing_class.image_processor):
            return super()._generate_and_score_completions(rows)

    def _score_held_out(self, rows: list[dict]) -> None:
        self._generate_and_score_completions(rows)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        began = time.perf_counter()
        rewards_B_1 = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # TRL gathers these from all ranks for its log, and has put the images into them
        prompts[:] = [row["prompt"] for row in inputs]
        self._note_rewards(
            inputs, answer_texts(completions), rewards_B_1[:, 0], time.perf_counter() - began
        )
        return rewards_B_1

    def _generate_in_process(
        self, generate: Callable, prompts: list[list[int]], images: list | None, **kwargs
    ):
        """vLLM's `generate`, with collapsed image tokens.

        vLLM must then read the prompts that the trainer has.
        """
        if images is None:
            return generate(prompts=prompts, images=None, **kwargs)
        processor = self.processing_class
        # InternVL-3's
        ends = [getattr(processor, f"{end}_image_token_id", None) for end in ("start", "end")]
        bare = [collapse_image_tokens(ids, processor.image_token_id, ends) for ids in prompts]
        read, *sampled = generate(prompts=bare, images=images, **kwargs)
        check_same_prompts(prompts, read)
        return read, *sampled

    def _compute_loss(self, model, inputs):
        self._compare_policies(inputs)
        # TRL computes the trainer's log-probs only if it also weights the loss by exp(trainer -
        # sampler), summed over a completion. Eq. 3 has no such weight. With top-p below 1 it would
        # be far below 1, because the sampler's distribution is truncated and renormalised.
        self.vllm_importance_sampling_correction = False
        if self.packing_unchecked:
            self.packing_unchecked = False
            self.packs = check_packing(self, super()._compute_loss, model, inputs)
        if self.micro_batch_tokens is None:
            return super()._compute_loss(model, inputs)
        return self._loss_of_micro_batches(super()._compute_loss, model, inputs)

    def _compare_policies(self, inputs: dict) -> None:
        """Compares trainer and sampler on the tokens of all ranks, so that all continue or none."""
        if self.checked or "sampling_per_token_logps" not in inputs:
            return
        sampler_logps = inputs["sampling_per_token_logps"]
        keep = inputs["completion_mask"].bool() & ~sampler_logps.isnan()
        pair = inputs["old_per_token_logps"].masked_fill(~keep, torch.nan), sampler_logps
        padded = [self.accelerator.pad_across_processes(logps, 1, torch.nan) for logps in pair]
        trainer_logps, sampler_logps = map(self.accelerator.gather, padded)
        keep = ~trainer_logps.isnan()
        if keep.any():  # false if all completions of this part are masked
            self._check_policy(trainer_logps[keep], sampler_logps[keep])

    def _loss_of_micro_batches(self, loss_of: Callable, model, inputs: dict) -> Tensor:
        """The loss of all micro-batches, after the backward pass of all but the last one."""
        entropy_coef, loss = self.entropy_coef, 0.0
        num_tokens = inputs["completion_mask"].sum().clamp(min=1)
        order = by_group(inputs, self.num_generations) if self.packs else by_length(inputs)
        parts = micro_batches(inputs, order, self._row_counts(row_lengths(inputs, order)))
        for number, part in enumerate(parts, start=1):
            # TRL's entropy bonus is a mean over the tokens of a call
            self.entropy_coef = entropy_coef * (part["completion_mask"].sum() / num_tokens).item()
            if number < len(parts):
                with self._no_optimizer_step():
                    part_loss = loss_of(model, part)
                    self._backward(part_loss)
                loss += part_loss.detach()
            else:
                loss = loss_of(model, part) + loss
        self.entropy_coef = entropy_coef
        if "entropy_coef" in self._metrics["train"]:
            self._metrics["train"]["entropy_coef"] = [entropy_coef]
        return loss

    def _row_counts(self, lengths_2_B: Tensor) -> list[int]:
        """Rows of each micro-batch: the same on all ranks, from the longest rows of any of them."""
        lengths = self.accelerator.gather(lengths_2_B[None]).amax(dim=0).tolist()
        if self.packs:
            held_out = not self.model.training
            group_size = self.num_generations_eval if held_out else self.num_generations
            return packed_row_counts(*lengths, group_size, self.micro_batch_tokens)
        return row_counts(*lengths, self.micro_batch_tokens)

    @contextmanager
    def _no_optimizer_step(self) -> Iterator[None]:
        """Within this context, a backward pass is not the last of a step, as DeepSpeed asks."""
        state = self.accelerator.gradient_state
        last = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(last)

    def _backward(self, loss: Tensor) -> None:
        """As transformers' Trainer does it. The loss is already scaled for the whole step."""
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """As in TRL, or for packed groups.

        batch_size is given if there is no gradient: it then works in batches that stay within the
        budget.
        """
        if self.packs:
            batch = {key: value for key, value in kwargs.items() if value is not None}
            for name, columns in (("ids", input_ids), ("mask", attention_mask)):
                batch[f"prompt_{name}"] = columns[:, :-logits_to_keep]
                batch[f"completion_{name}"] = columns[:, -logits_to_keep:]
            return *self._packed_logps(model, batch, batch_size), None
        if self.micro_batch_tokens is not None and batch_size is not None:
            width = torch.tensor([input_ids.shape[1]], device=input_ids.device)
            widest = int(self.accelerator.gather(width).max())  # the same number on every rank
            batch_size = max(1, min(batch_size, self.micro_batch_tokens // widest))
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
        )

    def _packed_logps(
        self, model, batch: dict, batch_size: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies (B, C); in one forward pass where batch_size is None."""
        rows, width = batch["completion_mask"].shape
        counts = [rows]
        if batch_size is not None and self.micro_batch_tokens is not None:
            counts = self._row_counts(row_lengths(batch, list(range(rows))))
        elif batch_size is not None:
            counts = [len(part) for part in torch.arange(rows).split(batch_size)]
        found = []
        for part in micro_batches(batch, list(range(rows)), counts):
            with self.accelerator.autocast():
                found.append(packed_logps(model, self._bare(model), part))
        logps, entropies = zip(*found, strict=True)
        return _rows_of_width(logps, width), _rows_of_width(entropies, width)


def _rows_of_width(parts: Sequence[Tensor | None], width: int) -> Tensor | None:
    """Rows of all parts, with zeros after them up to one width; None where the parts are None."""
    if parts[0] is None:
        return None
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])
