"""What runs methods inside generate() and forward(): hooks, stages, and their state."""
