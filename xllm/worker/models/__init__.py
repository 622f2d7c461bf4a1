"""Native models, one file a family, found by their Hugging Face architecture name."""
