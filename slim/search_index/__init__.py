"""Search in texts: a bi-encoder finds candidates, a cross-encoder puts them in order."""
