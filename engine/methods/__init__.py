"""How a backbone is adapted: all of it, a part of it, or a small addition to it that is saved alone."""
