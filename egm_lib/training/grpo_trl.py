"""GRPO by TRL's own rollouts and loss, with the cures that vision models need under vLLM."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from trl.generation import vllm_generation

from egm_lib.inference.vllm_engine import vllm_images
from egm_lib.training.grpo_trainer import TimedGRPO, answer_texts
from egm_lib.training.model_setup import TrainingError


def collapse_image_tokens(
    ids: Sequence[int], image_token: int, ends: Collection[int] = ()
) -> list[int]:
    """Each run of image tokens as one: vLLM in process expands them itself, and would see a
    longer prompt.

    ends: tokens before and after an image that vLLM puts there too (InternVL-3's); they are left
    out.
    """
    runs = ((token, len(list(run))) for token, run in itertools.groupby(ids) if token not in ends)
    return [token for token, length in runs for _ in range(1 if token == image_token else length)]


def check_same_prompts(trainer: Sequence[Sequence[int]], sampler: Sequence[Sequence[int]]) -> None:
    """Raises TrainingError where the sampler has read other tokens than the trainer: other answers
    would be trained.
    """
    for ours, theirs in zip(trainer, sampler, strict=True):
        if list(ours) != list(theirs):
            raise TrainingError(
                f"the sampler read a prompt of {len(theirs)} tokens, and the trainer has "
                f"{len(ours)}: they expand a "
                "image in different ways, which the checkpoint's processor and vLLM's model of it "
                "decide."
            )


@contextmanager
def vllm_options(**options: object) -> Iterator[None]:
    """Within it TRL starts its vLLM with these options besides its own, which leave no place for
    them.
    """
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
    """Empties what a vLLM in this process keeps of the weights before: image features, and keys
    and values of prompts.

    TRL empties the latter alone. With the old features of an image that comes again, trainer and
    sampler part by 0.15 nats where vision is trained.
    """
    for name in ("reset_encoder_cache", "reset_prefix_cache"):
        # vLLM has some on LLM, others on its engine
        for owner in (llm, getattr(llm, "llm_engine", None)):
            if hasattr(owner, name):
                getattr(owner, name)()
                break


class PlainGRPO(TimedGRPO):
    """TRL's own rollouts and loss, which equals ours (a test), with what vLLM needs.

    The step whose sampler is compared with the trainer is sampled without top-p and top-k.
    """

    def __init__(self, *args, rollout_dtype: str, **kwargs):
        with vllm_options(dtype=rollout_dtype, **vllm_images(kwargs["processing_class"])):
            super().__init__(*args, **kwargs)
        if self.use_vllm and self.vllm_mode == "colocate":
            self.vllm_generation.generate = partial(
                self._generate_in_process, self.vllm_generation.generate
            )
            # On the instance: TRL's `generate` calls it too, where vLLM has slept
            self.vllm_generation.sync_weights = partial(
                self._sync_in_process, self.vllm_generation.sync_weights
            )

    def _sync_in_process(self, sync_weights: Callable[[], None]) -> None:
        sync_weights()
        reset_caches(self.vllm_generation.llm)

    def _generate(self, prompts):
        began = time.perf_counter()
        self._plan_check()
        if self.use_vllm and not self.checked:
            self.vllm_importance_sampling_correction = True  # TRL then computes our log-probs too
            with self._uncut_sampling():
                generated = super()._generate(prompts)
        else:
            generated = super()._generate(prompts)
        self._note_rollout(generated[1], time.perf_counter() - began)
        return generated

    @contextmanager
    def _uncut_sampling(self) -> Iterator[None]:
        """Within it vLLM samples without top-p and top-k.

        It states the log-probs of the distribution that it samples from, and those of a cut one are
        not the trainer's.
        """
        sampler = self.vllm_generation
        cut = sampler.top_p, sampler.top_k
        sampler.top_p, sampler.top_k = 1.0, 0
        try:
            yield
        finally:
            sampler.top_p, sampler.top_k = cut

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        began = time.perf_counter()
        rewards_B_1 = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._note_rewards(
            inputs, answer_texts(completions), rewards_B_1[:, 0], time.perf_counter() - began
        )
        return rewards_B_1

    def _generate_in_process(
        self, generate: Callable, prompts: list[list[int]], images: list | None, **kwargs
    ):
        """vLLM's `generate` with images as vLLM wants them; it must come to the prompts that the
        trainer has.
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
        if not self.checked and "sampling_per_token_logps" in inputs:
            sampler_logps = inputs["sampling_per_token_logps"]
            keep = inputs["completion_mask"].bool() & ~sampler_logps.isnan()
            if keep.any():  # not so where all completions of this part are masked
                self._check_policy(inputs["old_per_token_logps"][keep], sampler_logps[keep])
        # TRL brings the trainer's log-probs along where it also weights the loss by exp(trainer -
        # sampler), summed over a completion. Eq. 3 has no such weight, and with top-p below 1 it is
        # far below 1: the sampler's are those of a cut and renormalised distribution.
        self.vllm_importance_sampling_correction = False
        return super()._compute_loss(model, inputs)
