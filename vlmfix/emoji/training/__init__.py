"""The tools that train the bundled model; running it does not need them."""
