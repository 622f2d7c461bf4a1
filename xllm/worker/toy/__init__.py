"""The toy engine: an executor without a model, whose streams can be predicted."""
