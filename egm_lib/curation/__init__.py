"""Curation: traces, amodal expressions, verification, failure causes (Sec. 3 and 4.1)."""
