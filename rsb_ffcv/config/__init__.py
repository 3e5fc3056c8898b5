"""The options of both programs, and how they are read from flags and YAML files."""
