"""Video demonstrations: which clips there are, whether they can be read, which frames are seen, and who decodes them."""
