"""What can go wrong when a project is made."""


class ProjectError(Exception):
    """No project could be made; the message is for the person at the terminal."""
