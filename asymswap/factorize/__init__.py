"""Tensors in, tensors out: the mathematics of replacing a convolution, with no modules and no graphs."""
