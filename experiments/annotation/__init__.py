"""Human preferences: items, who sees which in what order, the file of labels, its numbers, and the page that asks."""
