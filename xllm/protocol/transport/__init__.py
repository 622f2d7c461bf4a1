"""ZeroMQ under one thin wrapper: the only package that imports zmq."""
