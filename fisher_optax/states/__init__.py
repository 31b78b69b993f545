"""What an optimizer's state says, and how it is started from another's."""
