"""The demo in the browser: base and methods side by side, `vlmfix demo`."""
