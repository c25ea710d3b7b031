"""What the verbs return: records of numbers and text; knows neither torch nor rich."""
