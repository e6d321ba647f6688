"""Curation with VLM services: reasoning traces, amodal expressions, verification, failure judgements (Sections 3 and 4.1)."""
