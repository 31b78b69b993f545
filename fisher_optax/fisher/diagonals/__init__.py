"""The diagonal of the Fisher: squares of gradients, with their uncertainty."""
