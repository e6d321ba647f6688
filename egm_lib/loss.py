"""The training objective (Eq. 3-7) as pure functions on tensors.

Log-probs and entropies come from TRL's chunked LM head (`trl.kernels`), which never holds logits of
shape tokens x vocabulary.
"""

import torch
from torch import Tensor

RATIO_LEVELS = ("token", "sequence")
# exp() of a larger log-ratio may overflow, and its gradient then is inf * 0 = nan. exp(20) is far
# beyond any useful ratio.
MAX_LOG_RATIO = 20.0


def group_advantages(rewards_B: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """Rewards standardised within each prompt's group (Eq. 7).

    The deviation is that of a sample (n - 1), as in TRL.
    rewards_B: one reward per completion, groups contiguous, B = prompts * group_size.
    Returns advantages_B; a group whose rewards are all equal gets zeros.
    Raises ValueError if B is not a multiple of group_size, or a reward is not finite.
    """
    if group_size < 1 or rewards_B.ndim != 1 or rewards_B.numel() % group_size:
        raise ValueError(
            f"{tuple(rewards_B.shape)} rewards do not divide into groups of {group_size}"
        )
    rewards_B = rewards_B if rewards_B.is_floating_point() else rewards_B.float()
    if not rewards_B.isfinite().all():
        raise ValueError("rewards must be finite")
    rewards_P_G = rewards_B.view(-1, group_size)
    if group_size == 1 or rewards_B.numel() == 0:
        return torch.zeros_like(rewards_B)
    centred_P_G = rewards_P_G - rewards_P_G.mean(dim=1, keepdim=True)
    advantages_P_G = centred_P_G / (rewards_P_G.std(dim=1, keepdim=True) + eps)
    # The mean of equal floats may differ from them by rounding; eps would not keep that small.
    all_equal_P_1 = rewards_P_G.amax(dim=1, keepdim=True) == rewards_P_G.amin(dim=1, keepdim=True)
    return advantages_P_G.masked_fill(all_equal_P_1, 0.0).view(-1)


def grpo_loss(
    logps_B_T: Tensor,
    old_logps_B_T: Tensor,
    advantages_B: Tensor,
    mask_B_T: Tensor,
    *,
    ref_logps_B_T: Tensor | None = None,
    entropy_B_T: Tensor | None = None,
    clip_ratio: float = 0.2,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
    ratio_level: str = "token",
    num_tokens: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The negated objective of Eq. 3-6: the mean over tokens of clipped surrogate - KL + entropy.

    The KL term is the k3 estimate.
    logps_B_T: log-probs of the sampled tokens; old_: of the policy that sampled them; ref_: of the
    reference of the KL term.
    mask_B_T: 1.0 on completion tokens; other positions have no effect, even if they hold nan.
    ratio_level: "token" (GRPO, the paper), or "sequence" (GSPO, the released scripts): all tokens
    of a completion get the geometric mean of their ratios.
    num_tokens: completion tokens of the whole batch, if this is only a part of it (gradient
    accumulation). The losses of the parts, and their gradients, then add up to those of the whole.
    None: the tokens of this mask.
    Returns the loss (0-d; zero if no token counts) and metrics, which describe this part alone.
    Raises ValueError for a weight without its tensor, shapes that do not fit, and an unknown
    ratio_level.
    """
    same_shape = {
        "old_logps_B_T": old_logps_B_T,
        "mask_B_T": mask_B_T,
        "ref_logps_B_T": ref_logps_B_T,
        "entropy_B_T": entropy_B_T,
    }
    _check_arguments(logps_B_T, advantages_B, ratio_level, same_shape)
    if kl_weight and ref_logps_B_T is None:
        raise ValueError(f"kl_weight is {kl_weight}, but ref_logps_B_T is missing")
    if entropy_weight and entropy_B_T is None:
        raise ValueError(f"entropy_weight is {entropy_weight}, but entropy_B_T is missing")

    padding_B_T = mask_B_T == 0
    mask_B_T = mask_B_T.to(logps_B_T.dtype)
    count = mask_B_T.sum().clamp(min=1.0)
    advantages_B_1 = advantages_B.to(logps_B_T.dtype).unsqueeze(1)

    log_ratio_B_T = (logps_B_T - old_logps_B_T).masked_fill(padding_B_T, 0.0)
    if ratio_level == "sequence":
        tokens_B_1 = mask_B_T.sum(dim=1, keepdim=True).clamp(min=1.0)
        log_ratio_B_T = (
            (log_ratio_B_T * mask_B_T).sum(dim=1, keepdim=True) / tokens_B_1
        ).expand_as(mask_B_T)
    ratio_B_T = log_ratio_B_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_B_T = ratio_B_T.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    objective_B_T = torch.minimum(ratio_B_T * advantages_B_1, clipped_B_T * advantages_B_1)

    metrics: dict[str, Tensor] = {}
    if ref_logps_B_T is not None:
        gap_B_T = (
            (ref_logps_B_T - logps_B_T)
            .masked_fill(padding_B_T, 0.0)
            .clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        )
        kl_B_T = gap_B_T.exp() - gap_B_T - 1.0  # k3
        objective_B_T = objective_B_T - kl_weight * kl_B_T
        metrics["kl"] = (kl_B_T * mask_B_T).sum() / count
    if entropy_B_T is not None:
        entropy_B_T = entropy_B_T.masked_fill(padding_B_T, 0.0)
        objective_B_T = objective_B_T + entropy_weight * entropy_B_T
        metrics["entropy"] = (entropy_B_T * mask_B_T).sum() / count
    total = count
    if num_tokens is not None:
        total = torch.as_tensor(num_tokens, device=count.device).clamp(min=1.0)
    loss = -(objective_B_T * mask_B_T).sum() / total

    low_B_T = ((ratio_B_T < 1.0 - clip_ratio) & (advantages_B_1 < 0)).to(mask_B_T.dtype)
    high_B_T = ((ratio_B_T > 1.0 + clip_ratio) & (advantages_B_1 > 0)).to(mask_B_T.dtype)
    completions = max(advantages_B.numel(), 1)
    metrics |= {
        "clip_ratio/low_mean": (low_B_T * mask_B_T).sum() / count,
        "clip_ratio/high_mean": (high_B_T * mask_B_T).sum() / count,
        "clip_ratio/region_mean": ((low_B_T + high_B_T) * mask_B_T).sum() / count,
        "ratio/mean": (ratio_B_T * mask_B_T).sum() / count,
        "ratio/max": (ratio_B_T * mask_B_T).amax() if mask_B_T.numel() else count.new_zeros(()),
        "advantage/mean": advantages_B_1.sum() / completions,
        "advantage/abs_mean": advantages_B_1.abs().sum() / completions,
        "advantage/frac_zero": (advantages_B_1 == 0).sum() / completions,
    }
    detached = [value.detach().to(logps_B_T.dtype) for value in metrics.values()]
    values = torch.stack(detached).tolist()  # one transfer from the GPU instead of ten
    return loss, dict(zip(metrics, values, strict=True))


def _check_arguments(
    logps_B_T: Tensor, advantages_B: Tensor, ratio_level: str, others: dict[str, Tensor | None]
) -> None:
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(
            f"unknown ratio_level {ratio_level!r}: use one of {', '.join(RATIO_LEVELS)}"
        )
    if logps_B_T.ndim != 2:
        raise ValueError(f"logps_B_T must have two dimensions, got {tuple(logps_B_T.shape)}")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logps_B_T.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logps_B_T has {tuple(logps_B_T.shape)}"
            )
    if advantages_B.shape != logps_B_T.shape[:1]:
        raise ValueError(
            f"advantages_B must have shape {tuple(logps_B_T.shape[:1])}, got "
            f"{tuple(advantages_B.shape)}"
        )
