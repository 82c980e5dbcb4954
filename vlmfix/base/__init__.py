"""What the author of a method imports: one base class per kind of method."""
