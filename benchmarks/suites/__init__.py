"""The suites of `hut-bench`: a module each, with the rows that it measures or counts."""
