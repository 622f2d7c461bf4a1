"""One device: the engine that runs step plans, and its process."""
