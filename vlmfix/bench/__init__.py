"""Speed and memory, baseline and method in one run."""
