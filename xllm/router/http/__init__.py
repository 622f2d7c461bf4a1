"""The HTTP front end: OpenAI-compatible endpoints over the router's service."""
