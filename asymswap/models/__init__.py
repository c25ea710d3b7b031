"""From whatever names a model to a module with its preprocessing and example inputs."""
