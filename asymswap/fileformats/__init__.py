"""Bytes to named tensors and plain data; nothing in a file is executed."""
