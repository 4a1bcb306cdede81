"""What the pages of results have in common: their skeleton, numbers in words, exhibits, and how lines are drawn."""
