"""The quickstart: a tiny Stable Diffusion made on the spot, and what SePPO does to it."""
