"""Tables, score cards and plots of finished runs."""
