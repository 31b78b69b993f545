"""The Fisher of a softmax head, in closed form."""
