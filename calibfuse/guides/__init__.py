"""Guides over any causal language model, instead of the universal calibrator."""
