"""What images tell about each layer, layer-by-layer solving, and polish."""
