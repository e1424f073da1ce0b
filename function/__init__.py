"""The model function: a Flask app under gunicorn that owns one model and answers for it."""
