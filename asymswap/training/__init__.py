"""What needs labelled data: opening it, measuring accuracy on it, fine-tuning on it."""
