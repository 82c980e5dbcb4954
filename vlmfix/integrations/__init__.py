"""vlmfix inside other evaluation frameworks; only their plug-in mechanisms import this folder."""
