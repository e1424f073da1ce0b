"""A project of the user's own: the folder that `relight init` makes."""
