"""The device under a worker: what it is, how much memory it has, what it can compute."""
