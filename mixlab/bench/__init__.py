"""How fast a model is on this machine, beside others that compute the same."""
