"""What records say: tables, sentences, figures, one report. Nothing here makes a record."""
