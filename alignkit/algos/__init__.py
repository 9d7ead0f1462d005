"""One file a method, named like its YAML."""
