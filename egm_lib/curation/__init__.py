"""Curation with VLM services (Sections 3 and 4.1): traces, amodal expressions, verification,
failure judgements.
"""
