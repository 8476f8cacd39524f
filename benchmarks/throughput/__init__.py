"""How fast training and sampling are, beside a trainer as one would first write it and beside diffusers."""
