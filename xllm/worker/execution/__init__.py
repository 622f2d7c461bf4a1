"""Running step plans with a native model."""
