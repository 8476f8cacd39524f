"""The quickstart for video: a tiny AnimateDiff made on the spot, and what SePPO does to its movement."""
