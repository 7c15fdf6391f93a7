"""Questions with answers, made from pages by a model or taken from a catalogue
(``python -m slim.questions``)."""
