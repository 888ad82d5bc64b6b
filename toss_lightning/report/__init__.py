"""What a run tells people: tables, model cards, summary.json."""
