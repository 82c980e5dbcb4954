"""MME's hallucination subset."""
