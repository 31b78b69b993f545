"""The traced program of a loss: where each parameter is used, and how."""
