"""What every part of Relight shares, and what knows none of them: how settings are read."""
