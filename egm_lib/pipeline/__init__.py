"""A whole run: the notebooks in order, the jobs that they start, the manifest, the archive."""
