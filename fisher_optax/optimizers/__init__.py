"""The named optimizers: one file a method."""
