"""alignkit: a config-driven experiment runner for language-model alignment."""

__version__ = "0.1.0"
