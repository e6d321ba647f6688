"""EGM: efficient visual grounding with small vision-language models that reason (arXiv
2601.13633).
"""

__version__ = "0.1.0"
