"""What a benchmark reads: images, questions, answers."""
