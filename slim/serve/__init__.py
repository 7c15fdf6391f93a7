"""Models that answer: found, loaded, asked in the order of their coming, served over HTTP."""
