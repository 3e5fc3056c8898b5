"""The options of both programs, and their parser for flags and YAML files."""
