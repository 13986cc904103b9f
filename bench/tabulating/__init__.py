"""Tables of the documentation, in Markdown, from the records of benchmarks."""
