"""MLflow: runs, figures, files, and what it could not be told yet."""
