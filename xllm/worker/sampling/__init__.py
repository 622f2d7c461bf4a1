"""Drawing tokens: counter-based noise, penalties, filters, logprobs."""
