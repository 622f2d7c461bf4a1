"""Performance measurements: programs that a person runs, never timed tests."""
