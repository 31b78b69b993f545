"""Errors and gains of the Fisher, of compression and of axes."""
