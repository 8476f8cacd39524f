"""The quickstart of the second method: an improvement model from pairs, then iterative DPO with it."""
