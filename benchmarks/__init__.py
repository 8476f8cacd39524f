"""Measurements: ratios against named baselines in one run, with machine, versions and commit in each result file."""
