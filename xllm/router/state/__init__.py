"""The life of a request, as plain decisions: events in, instructions out."""
