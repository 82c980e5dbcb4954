"""Our tasks in the form of lmms-eval."""
