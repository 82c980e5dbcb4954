"""The tools that make the bundled model; nobody needs them to run it."""
