"""Having a model answer: loading it, three engines, decoding, predictions and latencies."""
