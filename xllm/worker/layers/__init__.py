"""The pieces that native models are made of."""
