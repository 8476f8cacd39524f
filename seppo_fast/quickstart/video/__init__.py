"""The quickstart for video: it makes a tiny AnimateDiff and shows what SePPO does to its movement."""
