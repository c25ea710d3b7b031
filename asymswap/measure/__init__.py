"""What models cost and how far their outputs moved, as numbers."""
