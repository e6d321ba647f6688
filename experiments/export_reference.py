"""Write a trained reference as data/mini/reference: bfloat16, tokenizer and processor beside it.

python experiments/export_reference.py data/runs/reference/model
"""

import shutil
import sys
from pathlib import Path

import torch

from egm_lib.inference.loading import load_model
from egm_lib.mini.models import save

OUT = Path("data/mini/reference")
model = load_model(sys.argv[1], "float32").to(torch.bfloat16)
save(model, OUT)
shutil.copy("data/mini/large/config.json", OUT)  # one architecture; no dtype of the training
(OUT / "model.safetensors").chmod(0o644)
size = (OUT / "model.safetensors").stat().st_size
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:,} bytes in {OUT}")
