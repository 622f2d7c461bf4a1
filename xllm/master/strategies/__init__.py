"""Scheduling decisions that can stand in for each other. docs/scheduling.md says what combines."""
