"""Small tools without a subject of their own: tensors, files, processes."""
