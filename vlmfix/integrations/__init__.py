"""vlmfix inside other people's evaluation frameworks; nothing here is imported unless asked for."""
