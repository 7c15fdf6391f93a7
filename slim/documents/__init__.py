"""Documents to data: PDF, PPTX, DOCX, HTML, Markdown and text files as records for training
(``python -m slim.documents``, ``data=documents``)."""
