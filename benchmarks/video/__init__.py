"""How fast videos are decoded, and how long training waits for them."""
