"""From files to rows, from rows to tokens."""
