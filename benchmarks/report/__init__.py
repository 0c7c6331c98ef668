"""Reports on records: tables, sentences, pictures, comparisons, verdicts, documents."""
