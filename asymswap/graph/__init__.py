"""How a model is read (torch.fx, shapes, sites) and written (swaps by name on a copy)."""
