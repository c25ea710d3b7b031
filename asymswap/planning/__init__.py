"""What is to be done to a model: recipes, plans, and budgets."""
