"""Scripts that run in the tools' environments: the standard library and the tool."""
