"""Numbers and text made into terminal tables, JSON and Markdown; knows no torch."""
