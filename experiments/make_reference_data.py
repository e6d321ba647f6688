"""More scenes of the miniature's own training recipe, for the reference; nothing else differs."""

import sys
from pathlib import Path

from egm_lib.mini.world import write_split

out, count = Path(sys.argv[1]), int(sys.argv[2])
(out / "images").mkdir(parents=True, exist_ok=True)
write_split(out, "train.jsonl", count)
