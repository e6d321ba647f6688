"""Memory and time of log-probs and entropies, forward and backward, at Qwen3's vocabulary.

TRL's chunked LM head is compared with full logits, log_softmax and entropy. Each variant runs in a
separate process, so that its peak memory can be measured.

    python benchmarks/bench_loss.py                          # CPU, 4,096 tokens
    python benchmarks/bench_loss.py --tokens 32768   # 32 completions of 1,024 tokens
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from egm_lib.loss import grpo_loss

CHUNK = 32_768  # vocabulary entries a tile, as TRL's trainer sets it
VARIANTS = ("chunked", "full")


def full_head(
    hidden_N_D: torch.Tensor, weight_V_D: torch.Tensor, targets_N: torch.Tensor
) -> list[torch.Tensor]:
    logps_N_V = (hidden_N_D @ weight_V_D.T).float().log_softmax(dim=-1)
    entropy_N = -(logps_N_V.exp() * logps_N_V).sum(dim=-1)
    return [logps_N_V.gather(1, targets_N[:, None]).squeeze(1), entropy_N]


def chunked_head(
    hidden_N_D: torch.Tensor, weight_V_D: torch.Tensor, targets_N: torch.Tensor
) -> list[torch.Tensor]:
    arguments = hidden_N_D, weight_V_D, None, targets_N, 1.0, CHUNK, None, 1.0, ("entropy",)
    return list(ChunkedLogProbFunction.apply(*arguments)[:2])


def measure(variant: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """Seconds (on a CPU: CPU seconds) and peak memory beyond the inputs of head, loss and backward;
    and the loss.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden_N_D = torch.randn(tokens, hidden, device=device, requires_grad=True)
    weight_V_D = (torch.randn(vocabulary, hidden, device=device) / hidden**0.5).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    advantages_B, mask_B_T = (
        torch.randn(tokens // 64, device=device),
        torch.ones(tokens // 64, 64, device=device),
    )

    def peak_bytes() -> int:
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # CPU seconds, because other work disturbs them less
    clock = time.perf_counter if device == "cuda" else time.process_time
    before, start = peak_bytes(), clock()
    head = chunked_head if variant == "chunked" else full_head
    logps_B_T, entropy_B_T = (x.view(-1, 64) for x in head(hidden_N_D, weight_V_D, targets_N))
    loss, _ = grpo_loss(
        logps_B_T,
        logps_B_T.detach(),
        advantages_B,
        mask_B_T,
        entropy_B_T=entropy_B_T,
        entropy_weight=0.01,
    )
    loss.backward()
    peak = peak_bytes() - before
    seconds = clock() - start
    gradient = hidden_N_D.grad.norm().item()
    return {"seconds": seconds, "peak_gib": peak / 2**30, "loss": loss.item(), "gradient": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument(
        "--variant", choices=VARIANTS, help="measure this one in this process and print it as JSON"
    )
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.tokens, args.hidden, args.vocabulary)))
        return
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{args.tokens:,} tokens x {args.vocabulary:,} entries, hidden {args.hidden:,}, float32, "
        f"{device}"
    )
    for variant in VARIANTS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--variant", variant],
            check=True,
            capture_output=True,
            text=True,
        )
        row = json.loads(done.stdout)
        print(
            f"{variant:8} {row['seconds']:7.1f} s  peak {row['peak_gib']:6.2f} GiB beyond the "
            "inputs  "
            f"loss {row['loss']:.6f}  |gradient| {row['gradient']:.6f}"
        )


if __name__ == "__main__":
    main()
