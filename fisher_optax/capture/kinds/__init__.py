"""The kinds of statistics that capture sums up."""
