"""One loop a stage: each file has one function, ``run``."""
