"""How an instance is chosen: one decision a file, interchangeable."""
