"""The objective against numpy, autograd's check and TRL's loss, and its invariances."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import GRPOTrainer

from egm_lib.loss import group_advantages, grpo_loss

OPTIONS = [
    dict(),
    dict(ratio_level="sequence"),
    dict(kl_weight=0.005),  # Table 6, QwenVL series
    dict(entropy_weight=0.01),  # Table 6, InternVL series
    dict(kl_weight=0.3, entropy_weight=0.2, clip_ratio=0.1, ratio_level="sequence"),
    dict(kl_weight=0.3, entropy_weight=0.2, clip_ratio=0.1),
]


def batch(
    seed: int = 0, completions: int = 6, tokens: int = 9, spread: float = 0.6
) -> dict[str, torch.Tensor]:
    """Ragged completions, log-ratios wide enough that clipping binds, float64."""
    rng = torch.Generator().manual_seed(seed)
    shape = completions, tokens
    logps = -torch.rand(shape, generator=rng, dtype=torch.float64) * 3
    lengths = torch.randint(1, tokens + 1, (completions, 1), generator=rng)
    return {
        "logps_B_T": logps.requires_grad_(),
        "old_logps_B_T": logps.detach()
        + spread * torch.randn(shape, generator=rng, dtype=torch.float64),
        "advantages_B": torch.randn(completions, generator=rng, dtype=torch.float64),
        "mask_B_T": (torch.arange(tokens) < lengths).double(),
        "ref_logps_B_T": logps.detach()
        + spread * torch.randn(shape, generator=rng, dtype=torch.float64),
        "entropy_B_T": torch.rand(shape, generator=rng, dtype=torch.float64).requires_grad_(),
    }


def loss_and_gradients(
    tensors: dict[str, torch.Tensor], **options
) -> tuple[float, torch.Tensor, dict[str, float]]:
    leaf = tensors["logps_B_T"].detach().clone().requires_grad_()
    loss, metrics = grpo_loss(**(tensors | {"logps_B_T": leaf}), **options)
    loss.backward()
    return loss.item(), leaf.grad, metrics


def numpy_loss(
    tensors, clip_ratio=0.2, kl_weight=0.0, entropy_weight=0.0, ratio_level="token"
) -> float:
    """Eq. 3-6, token by token."""
    logps, old, advantages, mask, ref, entropy = (
        tensor.detach().numpy() for tensor in tensors.values()
    )
    total = 0.0
    for b, t in np.argwhere(mask == 1):
        rows = (b, t) if ratio_level == "token" else (b, mask[b] == 1)
        rho = np.exp(np.mean(logps[rows] - old[rows]))
        surrogate = min(
            rho * advantages[b], np.clip(rho, 1 - clip_ratio, 1 + clip_ratio) * advantages[b]
        )
        delta = ref[b, t] - logps[b, t]
        total += (
            surrogate - kl_weight * (np.exp(delta) - delta - 1) + entropy_weight * entropy[b, t]
        )
    return -total / mask.sum()


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_is_the_equation(options):
    tensors = batch()
    loss, metrics = grpo_loss(**tensors, **options)
    assert loss.item() == pytest.approx(numpy_loss(tensors, **options), abs=1e-12)
    # Clipping binds, or this would test less than it says
    assert metrics["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_agrees_to_1e_6(options):
    tensors = {name: tensor.detach().float() for name, tensor in batch().items()}
    loss, _ = grpo_loss(**tensors, **options)
    assert loss.item() == pytest.approx(numpy_loss(batch(), **options), abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    tensors = batch(completions=3, tokens=4)

    def loss(logps, entropy):
        return grpo_loss(**(tensors | {"logps_B_T": logps, "entropy_B_T": entropy}), **options)[0]

    assert torch.autograd.gradcheck(loss, (tensors["logps_B_T"], tensors["entropy_B_T"]))


def trl_loss(
    tensors, *, parts=1, clip_ratio=0.2, kl_weight=0.0, entropy_weight=0.0, ratio_level="token"
):
    """Loss and metrics of TRL's `_compute_loss` on these tensors, set to the paper's objective.

    All but `_compute_loss` is a stand-in; the tests of the trainers run the whole.
    parts: micro-batches of a step.
    """
    args = SimpleNamespace(
        use_bias_correction_kl=False,
        delta=None,
        steps_per_generation=parts,
        importance_sampling_level=ratio_level,
    )
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=ratio_level,
        beta=kl_weight,
        loss_type="dapo",
        epsilon_low=clip_ratio,
        epsilon_high=clip_ratio,
        use_vllm=False,
        current_gradient_accumulation_steps=parts,
        _entropy_bonus_enabled=entropy_weight != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_weight,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            tensors["logps_B_T"],
            tensors["entropy_B_T"],
            None,
        ),
    )
    ids = torch.zeros_like(tensors["mask_B_T"], dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": tensors["mask_B_T"],
        "advantages": tensors["advantages_B"],
        "old_per_token_logps": tensors["old_logps_B_T"],
        "ref_per_token_logps": tensors["ref_logps_B_T"],
        "num_items_in_batch": tensors.get("num_tokens", tensors["mask_B_T"].sum()),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss, metrics


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_metrics_are_trls(options, seed):
    theirs, ours = batch(seed), batch(seed)
    their_loss, their_metrics = trl_loss(theirs, **options)
    our_loss, our_metrics = grpo_loss(**ours, **options)
    their_loss.backward()
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-9)
    torch.testing.assert_close(ours["logps_B_T"].grad, theirs["logps_B_T"].grad, atol=1e-9, rtol=0)
    if options.get("entropy_weight"):
        torch.testing.assert_close(
            ours["entropy_B_T"].grad, theirs["entropy_B_T"].grad, atol=1e-9, rtol=0
        )
    # TRL averages clipping over completions at sequence level, we average over tokens
    token_level = options.get("ratio_level") != "sequence"
    names = ["entropy"] + ["kl"] * ("kl" in their_metrics)
    names += [f"clip_ratio/{side}_mean" for side in ("low", "high", "region")] * token_level
    for name in names:
        assert our_metrics[name] == pytest.approx(their_metrics[name], abs=1e-6), name


def halves(tensors):
    return [
        {name: tensor[rows] for name, tensor in tensors.items()}
        for rows in (slice(0, 2), slice(2, None))
    ]


@pytest.mark.parametrize("options", OPTIONS)
def test_micro_batches_add_up_to_the_whole(options):
    tensors = batch()
    loss, gradient, _ = loss_and_gradients(tensors, **options)
    num_tokens = tensors["mask_B_T"].sum()
    parts = [loss_and_gradients(half, num_tokens=num_tokens, **options) for half in halves(tensors)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


def test_micro_batches_of_trl_add_up_to_the_same_whole():
    tensors = batch()
    num_tokens = tensors["mask_B_T"].sum()
    # TRL's entropy bonus is a mean of each micro-batch: there the two differ
    options = dict(kl_weight=0.3)
    parts = [
        trl_loss(half | {"num_tokens": num_tokens}, parts=2, **options)[0]
        for half in halves(tensors)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(
        grpo_loss(**tensors, **options)[0].item(), abs=1e-9
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_padding_and_its_contents_do_not_matter(options):
    tensors = batch()
    loss, gradient, metrics = loss_and_gradients(tensors, **options)
    junk = {
        "logps_B_T": torch.nan,
        "old_logps_B_T": torch.inf,
        "ref_logps_B_T": -torch.inf,
        "entropy_B_T": torch.nan,
    }
    pad = torch.nn.functional.pad
    padded = {
        name: pad(tensor.detach(), (0, 5), value=junk.get(name, 0.0))
        for name, tensor in tensors.items()
    }
    padded["advantages_B"] = tensors["advantages_B"]
    loss_2, gradient_2, metrics_2 = loss_and_gradients(padded, **options)
    assert loss_2 == pytest.approx(loss, abs=1e-12) and metrics_2 == pytest.approx(metrics)
    torch.testing.assert_close(gradient_2[:, :9], gradient)
    assert (gradient_2[:, 9:] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_order_of_completions_does_not_matter(options):
    tensors = batch()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    loss, gradient, metrics = loss_and_gradients(tensors, **options)
    loss_2, gradient_2, metrics_2 = loss_and_gradients(
        {k: v.detach()[order] for k, v in tensors.items()}, **options
    )
    assert loss_2 == pytest.approx(loss, abs=1e-12) and metrics_2 == pytest.approx(metrics)
    torch.testing.assert_close(gradient_2, gradient[order])


def test_an_empty_completion_changes_nothing():
    tensors = batch()
    loss, gradient, _ = loss_and_gradients(
        tensors, kl_weight=0.1, entropy_weight=0.1, ratio_level="sequence"
    )
    with_empty = {
        name: torch.cat([t.detach(), torch.zeros_like(t[:1])]) for name, t in tensors.items()
    }
    loss_2, gradient_2, _ = loss_and_gradients(
        with_empty, kl_weight=0.1, entropy_weight=0.1, ratio_level="sequence"
    )
    assert loss_2 == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(gradient_2[:6], gradient)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("completions, tokens", [(6, 9), (6, 0), (0, 9)])
def test_nothing_to_learn_from_gives_zeros_not_nan(options, completions, tokens):
    tensors = {name: tensor.detach()[:completions] for name, tensor in batch().items()}
    tensors = {
        name: tensor[:, :tokens] if tensor.ndim == 2 else tensor for name, tensor in tensors.items()
    }
    tensors["mask_B_T"] = torch.zeros_like(tensors["mask_B_T"])
    for num_tokens in (None, 0, 10):
        loss, gradient, metrics = loss_and_gradients(tensors, num_tokens=num_tokens, **options)
        assert loss == 0 and (gradient == 0).all()
        assert all(np.isfinite(value) for value in metrics.values())


def test_a_runaway_ratio_gives_finite_gradients():
    tensors = batch()
    tensors["old_logps_B_T"] = tensors["old_logps_B_T"] - 1e4
    tensors["ref_logps_B_T"] = tensors["ref_logps_B_T"] + 1e4
    loss, gradient, _ = loss_and_gradients(tensors, kl_weight=0.1)
    assert np.isfinite(loss) and gradient.isfinite().all()


def test_on_policy_the_gradient_is_the_policy_gradient():
    tensors = batch(spread=0.0)
    _, gradient, metrics = loss_and_gradients(tensors)
    expected = -tensors["advantages_B"][:, None] * tensors["mask_B_T"] / tensors["mask_B_T"].sum()
    torch.testing.assert_close(gradient, expected)
    assert metrics["ratio/mean"] == pytest.approx(1) and metrics["ratio/max"] == pytest.approx(1)
    assert metrics["clip_ratio/region_mean"] == 0


def test_metrics_by_hand():
    one = torch.ones(2, 2, dtype=torch.float64)
    _, metrics = grpo_loss(
        # Ratios 1.5, 1; 0.5, masked
        torch.tensor([[0.5, 0.0], [-0.5, 7.0]]).double().log1p().nan_to_num(),
        0 * one,
        torch.tensor([1.0, -2.0]).double(),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double(),
        ref_logps_B_T=torch.tensor([[0.5, 0.0], [-0.5, 0.0]]).double().log1p(),
        entropy_B_T=torch.tensor([[1.0, 2.0], [6.0, 100.0]]).double(),
    )
    assert metrics == pytest.approx(
        {
            "kl": 0,  # the reference is the policy
            "entropy": 3,
            "clip_ratio/low_mean": 1 / 3,
            "clip_ratio/high_mean": 1 / 3,
            "clip_ratio/region_mean": 2 / 3,
            "ratio/mean": 1,
            "ratio/max": 1.5,
            "advantage/mean": -0.5,
            "advantage/abs_mean": 1.5,
            "advantage/frac_zero": 0,
        }
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kl_weight=0.1, ref_logps_B_T=None), "ref_logps_B_T is missing"),
        (dict(entropy_weight=0.1, entropy_B_T=None), "entropy_B_T is missing"),
        (dict(ratio_level="word"), "unknown ratio_level 'word': use one of token, sequence"),
        (dict(mask_B_T=torch.ones(6, 8)), r"mask_B_T has shape \(6, 8\), logps_B_T has \(6, 9\)"),
        (dict(advantages_B=torch.ones(6, 1)), r"advantages_B must have shape \(6,\)"),
        (dict(logps_B_T=torch.ones(9)), "two dimensions"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(batch() | change))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5)
)
def test_advantages_are_standardised_within_the_group(groups):
    advantages = (
        group_advantages(torch.tensor(groups, dtype=torch.float64).flatten(), 4).view(-1, 4).numpy()
    )
    for rewards, group in zip(np.array(groups), advantages, strict=True):
        std = rewards.std(ddof=1)
        expected = (
            np.zeros(4)
            if rewards.min() == rewards.max()
            else (rewards - rewards.mean()) / (std + 1e-4)
        )
        np.testing.assert_allclose(group, expected, atol=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 0.7777777])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_all_equal_group_gets_exact_zeros(reward, dtype):
    assert (group_advantages(torch.full((32,), reward, dtype=dtype), 16) == 0).all()


def test_advantages_of_the_smallest_groups():
    # Alone, nothing to compare with
    assert group_advantages(torch.tensor([0.3, 0.9]), 1).tolist() == [0, 0]
    assert group_advantages(torch.tensor([]), 4).tolist() == []
    assert group_advantages(torch.tensor([1, 0]), 2).tolist() == pytest.approx(
        [0.7070, -0.7070], abs=1e-4
    )


def test_advantages_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match=r"\(5,\) rewards do not divide into groups of 2"):
        group_advantages(torch.ones(5), 2)
    with pytest.raises(ValueError, match="groups of 0"):
        group_advantages(torch.ones(4), 0)
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([1.0, torch.nan]), 2)
