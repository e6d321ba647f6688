"""Prediction files -> scores, metrics with intervals, paired differences."""
