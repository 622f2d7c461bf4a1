"""The service: clients' requests in, tokens out; where and when each request runs."""
