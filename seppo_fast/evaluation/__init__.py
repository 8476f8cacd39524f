"""Scores and pictures of models, side by side."""
