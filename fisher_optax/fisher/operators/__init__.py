"""The Fisher as an operator, exact or approximated."""
