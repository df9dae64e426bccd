"""The skew pair and its solution by fixed steps: derivation in README.md beside this file."""
