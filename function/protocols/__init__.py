"""What callers speak: each module adds the routes of one protocol to the app."""
