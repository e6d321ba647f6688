"""What it takes to run SFT and GRPO: trainers, checkpoints, the clock, checks, selection, plans."""
