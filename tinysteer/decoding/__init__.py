"""Tokens one after another: a step, batches, captured graphs, sampling, explanation."""
