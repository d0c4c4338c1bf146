"""Models and their tasks."""
