"""The faults, by what they hit. `table` lists all of them."""
