"""What the processes of one training agree on. In a single process, nothing here has an effect.

Rank 0 decides and the others follow. If each rank decided by its clock and its files, the ranks
could disagree, and a collective operation that one of them does not enter hangs the others.
"""

from __future__ import annotations

import torch
from torch import distributed


def several() -> bool:
    """Whether this process belongs to a training of several."""
    return distributed.is_available() and distributed.is_initialized()


def is_main() -> bool:
    """Whether this process is rank 0."""
    return not several() or distributed.get_rank() == 0


def barrier() -> None:
    """Waits until every rank is here."""
    if several():
        distributed.barrier()


def agreed(*values: float, device: torch.device | str = "cpu") -> list[float]:
    """Rank 0's values, on every rank. device: where the backend's tensors live, `args.device`."""
    if not several():
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.broadcast(shared, src=0)
    return shared.tolist()


def leave() -> None:
    """Waits for the slowest rank, then ends the group: a rank that left early would end the job."""
    if several():
        barrier()
        distributed.destroy_process_group()
