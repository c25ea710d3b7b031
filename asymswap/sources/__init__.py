"""Where models come from: references, files, safe loading, and the small networks that torchvision lacks."""
