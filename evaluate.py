"""Measure one checkpoint, or several in one table.

``python evaluate.py model.source=FOLDER`` or ``model.source=[FOLDER,FOLDER]``.
"""

from slim.cli.commands import evaluate

if __name__ == "__main__":
    evaluate()
