"""The tests run on the CPU, also on a machine with GPUs: they compare numbers to the last digits.

What needs a GPU is in `make rehearse` and benchmarks/.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
