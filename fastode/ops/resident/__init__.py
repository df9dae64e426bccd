"""The resident engine."""
