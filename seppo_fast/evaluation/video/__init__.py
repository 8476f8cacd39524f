"""Scores of generated clips beside the real clips of the same prompts."""
