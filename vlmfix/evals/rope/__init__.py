"""ROPE."""
